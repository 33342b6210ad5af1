"""A sparse delta: the entries of a fine-tune that were kept, as places and values, without the base around them.

A `.safetensors` file; for each tensor NAME with kept entries

- ``NAME.value``: the kept entries in the base's type, in memory order: values to put there, nothing to add;
- ``NAME.place``: U16, where each lies in its stretch of 65,536 entries of the flat tensor;
- ``NAME.count``: U32, how many entries each stretch has.

``<stem>.json`` beside it says which base they belong to. 4 bytes per kept entry in bf16: at density 0.1 a fifth of the
base's size, at 0.005 a hundredth. numpy only.
"""

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.atomic import disk_errors, publish, write_json
from fisherkit.checkpoint.index import CheckpointIndex, open_index
from fisherkit.checkpoint.target import check_target
from fisherkit.checkpoint.work_folder import STAGING
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.errors import CheckpointError, OutputError
from fisherkit.floats import STORED, Stored

FORMAT = "fisherkit.delta/1"
STRETCH = 1 << 16
_PARTS = (".value", ".place", ".count")


def sidecar_of(path: Path) -> Path:
    """The JSON beside a sparse delta."""
    return path.with_suffix(".json")


def is_sparse_delta(path: Path) -> bool:
    """Whether a file is one that this module wrote.

    Raises:
        CheckpointError: its tensors are those of one, and the JSON beside it is not there, or another's.
    """
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    if _about(path).get("format") == FORMAT:
        return True
    if all(name.endswith(_PARTS) for name in open_index(path).tensors):
        raise CheckpointError(
            f"{path}: is a sparse delta without its {sidecar_of(path).name}; put that beside it, named as it was made"
        )
    return False


def check_sidecar(path: Path) -> None:
    """Refuse a target beside which a JSON lies that is not its own; called before any work.

    Raises:
        OutputError: see above.
    """
    beside = sidecar_of(path)
    if os.path.lexists(beside) and not _about(path):
        raise OutputError(f"{beside}: exists already, and what {path.name} is goes there; choose another name")


def _about(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(sidecar_of(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("file") == path.name else {}


class SparseDelta:
    """Reads a sparse delta and puts it into tensors of its base."""

    def __init__(self, path: Path, base: CheckpointIndex) -> None:
        about = _about(path)
        if about.get("base_fingerprint") != base.fingerprint():
            raise CheckpointError(
                f"{path}: was made for another base ({about.get('base', 'unknown')}) than {base.path}; its entries are "
                "values that replace those of that very checkpoint"
            )
        self._path = path
        self._reader = ArrayReader(open_index(path))
        names = self._reader.index.tensors
        self.names = tuple(name for name in base.tensors if f"{name}.value" in names)
        if 3 * len(self.names) != len(names):
            raise CheckpointError(f"{path}: holds tensors that {base.path} does not have; fetch both again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, at)

    def apply(self, name: str, out: Stored) -> None:
        """Put the entries of a tensor into the flat ``out``.

        Raises:
            CheckpointError: places and values do not belong together, or lie outside of the tensor.
        """
        values, indices = self._reader.read(f"{name}.value"), self.indices(name)
        if values.dtype != out.dtype or values.shape != indices.shape or (indices.size and indices[-1] >= out.size):
            raise CheckpointError(f"{self._path}: the entries of {name!r} do not fit it; fetch the file again")
        out[indices] = values

    def indices(self, name: str) -> NDArray[np.int64]:
        """Flat indices of the kept entries, ascending."""
        counts = self._reader.read(f"{name}.count").astype(np.int64)
        places = self._reader.read(f"{name}.place").astype(np.int64)
        if int(counts.sum()) != places.size:
            raise CheckpointError(f"{self._path}: the places of {name!r} are inconsistent; fetch the file again")
        return np.repeat(np.arange(counts.size, dtype=np.int64) * STRETCH, counts) + places

    def fingerprint(self) -> str:
        """Of its tensors."""
        return self._reader.index.fingerprint()


class SparseWriter:
    """Collects kept entries tensor by tensor on disk, and makes a sparse delta of them at the end."""

    def __init__(self, work: Path) -> None:
        self._staging = work / STAGING
        self._raw = work / "entries.raw"
        self._file = self._raw.open("wb")
        self._specs: list[TensorSpec] = []

    def add(self, name: str, size: int, code: str, indices: NDArray[np.int64], values: Stored) -> None:
        """Add a tensor of ``size`` entries: ascending flat indices, and the values there."""
        if not indices.size:
            return
        counts = np.bincount(indices // STRETCH, minlength=-(-size // STRETCH)).astype(np.uint32)
        places = (indices % STRETCH).astype(np.uint16)
        for suffix, kind, data in (("value", code, values), ("place", "U16", places), ("count", "U32", counts)):
            self._specs.append(TensorSpec(f"{name}.{suffix}", kind, data.shape))
            with disk_errors(self._raw, data.nbytes):
                self._file.write(np.ascontiguousarray(data).view(np.uint8).data)

    def close(self) -> None:
        """Close the file of collected entries."""
        with contextlib.suppress(OSError):  # what could not be written is of no use any more
            self._file.close()

    def finish(self, target: Path, about: dict[str, Any], *, force: bool) -> Path:
        """Write ``target`` and the JSON beside it.

        Raises:
            CheckpointError: nothing was kept.
            OutputError: the target exists (unless ``force``) or cannot be written.
        """
        with disk_errors(self._raw, self._raw.stat().st_size):
            self._file.close()
        if not self._specs:
            raise CheckpointError(f"{target}: no entry was kept, so there is nothing to write")
        with StreamedWriter.create(target, self._specs, work=self._staging) as writer, self._raw.open("rb") as raw:
            for spec in self._specs:
                self._copy(raw.fileno(), spec, writer)
            writer.seal()
        beside = sidecar_of(target)
        write_json(self._staging / beside.name, {"format": FORMAT, "file": target.name, **about})
        check_target(target, force=force)
        publish([(self._staging / path.name, path) for path in (beside, target)])
        self._raw.unlink()
        return target

    @staticmethod
    def _copy(raw: int, spec: TensorSpec, writer: StreamedWriter) -> None:
        kind, left = STORED[spec.dtype], spec.shape[0]
        done, step = 0, (8 << 20) // kind.itemsize
        while done < left:
            part = os.read(raw, min(step, left - done) * kind.itemsize)
            part += b"" if len(part) % kind.itemsize == 0 else os.read(raw, kind.itemsize - len(part) % kind.itemsize)
            if not part:
                raise CheckpointError("the entries put aside ended early; run it again")
            elements = np.frombuffer(part, kind)
            writer.write_stored(spec.name, elements, done)
            done += elements.size
        writer.mark_written([spec.name])
