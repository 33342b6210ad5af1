"""Tensors and byte ranges of one `.safetensors` file, from its header alone.

Standard library only. Knows nothing of folders, indexes or the hub. A header is untrusted: whatever it
claims is held against the file before anybody allocates memory for it.

Layout of the file: 8 bytes little-endian header length, the header as JSON, the tensors' bytes.
"""

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.dtypes import DTYPES
from fisherkit.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 64  # what torch can hold; also keeps the product of a hostile shape cheap
_MAX_NUMEL = 2**59  # entries of up to 16 bytes whose number of bytes fits 63 bits


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, and where its bytes are.

    Attributes:
        name: the tensor's name on disk.
        dtype: safetensors code such as ``BF16``.
        shape: sizes; ``()`` for a scalar.
        file: the file that holds it.
        start: absolute offset of its first byte in ``file``; -1 where only torch knows (`.pt`).
        nbytes: length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a `.safetensors` file in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, is something else, is truncated, or its header is inconsistent.
    """
    size = file_size(path)
    length = _header_length(path, read_start(path, 8), size)
    raw = read_start(path, 8 + length)[8:]
    entries = parse_json(path, raw, "header")
    broken = next((name for name in entries if any("\ud800" <= character <= "\udfff" for character in name)), None)
    if broken is not None:
        raise CheckpointError(f"{path}: {broken!r} is no name, half of a character is missing; fetch the file again")
    about = entries.get("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise CheckpointError(f"{path}: its __metadata__ is not texts by name, so no library reads it; fetch it again")
    infos = [_tensor_info(path, name, entries[name], 8 + length) for name in entries if name != "__metadata__"]
    infos.sort(key=lambda info: (info.start, info.nbytes))
    _check_ranges(path, infos, 8 + length, size)
    return {info.name: info for info in infos}


def file_size(path: Path) -> int:
    """Size in bytes of a regular file (links are followed: the hub's cache is made of them).

    Raises:
        CheckpointError: there is no such file, or it is a folder, a pipe or a device.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError:  # a NUL inside the name
        raise CheckpointError(f"{str(path)!r}: not a file name") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return found.st_size


def parse_json(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in ``raw``; see parse_any.

    Raises:
        CheckpointError: it is not JSON in UTF-8, not an object, or has a key twice; ``what`` names it in the message.
    """
    found = parse_any(path, raw, what)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object; fetch the file again")
    return found


def parse_any(path: Path, raw: bytes, what: str) -> Any:
    """Return the JSON value in ``raw``; keys that occur twice are refused, since readers differ in which one they take.

    Raises:
        CheckpointError: it is not JSON in UTF-8, or has a key twice; ``what`` names it in the message.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise CheckpointError(f"{path}: {what} is not valid JSON: {reason}; fetch the file again") from None


def fits_memory(sizes: Any) -> bool:
    """Return whether a value is a list of sizes that torch and numpy can hold; [2**62, 0], though empty, is none."""
    if not isinstance(sizes, list | tuple) or len(sizes) > _MAX_DIMS:
        return False
    if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        return False
    return bool(math.prod(size for size in sizes if size) < _MAX_NUMEL)


def looks_like(path: Path) -> str:
    """Say what a file holds instead of tensors, as the end of a sentence; empty if that is not plain."""
    head = read_start(path, 512)
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; run `git lfs pull`"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, so the download went wrong"
    if head.startswith(b"PK\x03\x04"):
        return "it is a zip archive; if torch.save made it, name it .pt"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file; give the safetensors it was made from"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "it is a Python pickle; if torch.save made it, name it .pt"
    return "it is text" if head and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else ""


def read_start(path: Path, nbytes: int) -> bytes:
    """Read the first bytes of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(nbytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} occurs twice")
        found[key] = value
    return found


def _header_length(path: Path, first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) == 8 and 2 <= length <= MAX_HEADER_BYTES and 8 + length <= size:
        return length
    other = looks_like(path)
    if other or length > MAX_HEADER_BYTES:
        claim = other or f"its first 8 bytes claim a header of {length} bytes"
        raise CheckpointError(f"{path}: not a safetensors file: {claim}")
    raise CheckpointError(
        f"{path}: truncated: {size} bytes, and the header alone needs {8 + length}; fetch the file again"
    )


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: its header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not fits_memory(shape):
        raise CheckpointError(f"{where}: its shape is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: its data_offsets are not a byte range")
    start, stop = offsets
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits != 8 * (stop - start):
        raise CheckpointError(f"{where}: {dtype} of shape {shape} needs {-(-bits // 8)} bytes, not {stop - start}")
    return TensorInfo(name, dtype, tuple(shape), path, base + start, stop - start)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_ranges(path: Path, infos: list[TensorInfo], base: int, size: int) -> None:
    """Refuse tensors that do not cover the file from ``base`` to its end, each byte once, as the format demands.

    Bytes that the header does not speak of are a sign that the header, or the file, is another's.

    Args:
        path: the file.
        infos: its tensors in the order of their bytes.
        base: absolute offset of the first byte behind the header.
        size: bytes of the file.
    """
    end, previous, holes = base, "", ""
    for info in infos:
        if info.start < end and info.nbytes:
            raise CheckpointError(f"{path}: tensors {previous!r} and {info.name!r} overlap")
        holes = holes or (f"before tensor {info.name!r}" if info.start > end else "")
        end, previous = max(end, info.start + info.nbytes), info.name
    if end > size:
        raise CheckpointError(f"{path}: truncated: {size} bytes, and its header needs {end}; fetch the file again")
    if infos and end < size:
        holes = holes or f"behind the last tensor, {size - end} of them"
    if holes:
        raise CheckpointError(f"{path}: damaged: holds bytes {holes} that its header does not name; fetch it again")
