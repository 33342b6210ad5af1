"""Index of a checkpoint: names, types, shapes and byte ranges, without reading a tensor.

Standard library only at import. Knows the layouts (one file; shards with an index; `.safetensors` or torch)
and trusts none of them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from fisherkit.checkpoint.headers import MAX_HEADER_BYTES, TensorInfo, file_size, parse_json, read_header
from fisherkit.checkpoint.hub import ModelSource, resolve_model
from fisherkit.errors import CheckpointError

__all__ = ["CheckpointIndex", "ModelSource", "TensorInfo", "open_index", "resolve_model"]

Kind = Literal["safetensors", "torch"]

_KINDS: Mapping[str, Kind] = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch"}
# What a trainer leaves beside a model in files of torch's kind.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class CheckpointIndex:
    """Everything a checkpoint holds.

    Attributes:
        path: the folder or file that was opened.
        kind: ``safetensors``, or ``torch`` for what torch.save wrote.
        tensors: by name, in the order of the files and of the bytes in them.
        files: the files that hold them.
    """

    path: Path
    kind: Kind
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, types, shapes and at most 4 KB from the bytes of each tensor.

        Reads little, yet another fine-tune of the same layout has another fingerprint. How the tensors are
        spread over files, and where those are, makes no difference.

        Raises:
            CheckpointError: a file cannot be read.
        """
        digests: dict[str, bytes] = {}
        for file in self.files:
            infos = [info for info in self.tensors.values() if info.file == file]
            digests |= _sample_torch(file, infos) if self.kind == "torch" else _sample(file, infos)
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            total.update(json.dumps([name, info.dtype, info.shape]).encode() + digests[name])
        return total.hexdigest()


def open_index(path: Path) -> CheckpointIndex:
    """Index a folder (shards with an index, or one file), a `.safetensors` file, or a `.pt`/`.pth`/`.bin` file.

    Raises:
        CheckpointError: nothing there, ambiguous, inconsistent, or damaged.
    """
    path = Path(path)
    chosen = _choose(path) if path.is_dir() else path
    file_size(chosen)
    if chosen.name.endswith(".index.json"):
        files, tensors = _read_shards(chosen)
    else:
        files, tensors = (chosen,), _read_file(chosen)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return CheckpointIndex(path, _kind(files[0]), tensors, files)


def _choose(folder: Path) -> Path:
    """Return the file of a folder that says where its tensors are: an index, else the only file of tensors."""
    names = sorted(entry.name for entry in folder.iterdir())
    for ending, preferred in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        indexes = [name for name in names if name.endswith(f".{ending}.index.json")]
        if indexes:
            return folder / _only(folder, indexes, f"{preferred}.index.json", "indexes")
        suffixes = (".safetensors",) if ending == "safetensors" else (".bin", ".pt", ".pth")
        single = [name for name in names if name.endswith(suffixes) and not name.startswith(_NOT_WEIGHTS)]
        if single:
            return folder / _only(folder, single, preferred, "tensor files and no index")
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError(f"{folder}: holds GGUF only; give the safetensors checkpoint it was made from")
    raise CheckpointError(f"{folder}: no tensor file in this folder (*.safetensors, pytorch_model.bin, *.pt)")


def _only(folder: Path, names: list[str], preferred: str, what: str) -> str:
    if preferred in names or len(names) == 1:
        return preferred if preferred in names else names[0]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise CheckpointError(f"{folder}: {len(names)} {what} ({shown}); name the file instead of the folder")


def _kind(path: Path) -> Kind:
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise CheckpointError(f"{path}: not a tensor file by its name; expected {', '.join(_KINDS)} or a folder")
    return kind


def _read_file(path: Path) -> dict[str, TensorInfo]:
    if _kind(path) == "safetensors":
        return read_header(path)
    from fisherkit.checkpoint.pickles import torch_infos

    return torch_infos(path)


def _read_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    wanted: dict[str, set[str]] = {}
    for name, shard in _weight_map(index).items():
        wanted.setdefault(shard, set()).add(name)
    files = {shard: index.parent / shard for shard in sorted(wanted)}
    missing = [shard for shard, file in files.items() if not file.exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{index}: {len(missing)} of {len(files)} shards are missing: {shown}; fetch them")
    tensors: dict[str, TensorInfo] = {}
    for shard, file in files.items():
        found = _read_file(file)
        absent = sorted(wanted[shard] - found.keys())
        if absent:
            raise CheckpointError(
                f"{file}: {len(absent)} tensors that {index.name} places here are not in it, the first {absent[0]!r}"
            )
        # A shard may hold more than the index says (stale copies); the index decides.
        tensors.update((name, info) for name, info in found.items() if name in wanted[shard])
    return tuple(files.values()), tensors


def _weight_map(index: Path) -> dict[str, str]:
    if file_size(index) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{index}: {file_size(index)} bytes are absurd for an index")
    try:
        raw = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from None
    weight_map = parse_json(index, raw, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensor names to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_below(shard):
            raise CheckpointError(
                f"{index}: tensor {name!r} is placed in {shard!r}, which is not a file beside the index"
            )
    return weight_map


def _is_below(shard: str) -> bool:
    """A plain relative name. Links are not looked at: the hub's cache is made of links that leave the folder."""
    parts = PurePosixPath(shard).parts
    return bool(parts) and not shard.startswith("/") and ".." not in parts and not set(shard) & {"\\", ":", "\0", "\n"}


def sample_windows(nbytes: int) -> list[tuple[int, int]]:
    """Return the byte ranges that stand for ``nbytes`` bytes: start, middle and end; all of them when they are few."""
    if nbytes <= _SAMPLE_BYTES:
        return [(0, nbytes)]
    width = _SAMPLE_BYTES // 3
    return [(start, start + width) for start in (0, (nbytes - width) // 2, nbytes - width)]


def _sample(file: Path, infos: Iterable[TensorInfo]) -> dict[str, bytes]:
    digests = {}
    try:
        with file.open("rb") as stream:
            for info in infos:
                parts = (os.pread(stream.fileno(), b - a, info.start + a) for a, b in sample_windows(info.nbytes))
                digests[info.name] = hashlib.sha256(b"".join(parts)).digest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    return digests


def _sample_torch(file: Path, infos: Iterable[TensorInfo]) -> dict[str, bytes]:
    from fisherkit.checkpoint.pickles import sample_digests

    return sample_digests(file, {info.name: sample_windows(info.nbytes) for info in infos})
