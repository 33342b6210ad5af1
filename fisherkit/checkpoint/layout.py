"""Places of the tensors' bytes in a file that is laid out first and filled later.

Laying out makes a sparse file of the final size with everything but the tensors in it; only metadata is
written, however large the file. Knows single files; folders, work folders and renames are the writer's.
"""

import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fisherkit.checkpoint.dtypes import DTYPES, dtype_code
from fisherkit.errors import CheckpointError, ResumeError

if TYPE_CHECKING:
    import torch

_ALIGN = 8  # of the data in a `.safetensors` file; its own writers do the same
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to come: its name, safetensors type code (``BF16``) and shape.

    Raises:
        ValueError: on construction, for a type that torch cannot hold.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or DTYPES[self.dtype].torch_name is None:
            raise ValueError(f"tensor {self.name!r}: torch cannot hold {self.dtype}")

    @property
    def torch_dtype(self) -> "torch.dtype":
        """Same type in torch."""
        import torch

        return getattr(torch, str(DTYPES[self.dtype].torch_name))  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True)
class Slot:
    """Place of one tensor: ``spec.nbytes`` bytes of ``file`` from ``offset`` on."""

    spec: TensorSpec
    file: Path
    offset: int


def lay_out(path: Path, specs: Sequence[TensorSpec]) -> list[Slot]:
    """Make ``path`` with room for the tensors, by its suffix (`.pt` or `.safetensors`).

    Raises:
        OSError: the disk is full or cannot be written.
    """
    path.unlink(missing_ok=True)
    if path.suffix.lower() == ".pt":
        return _lay_out_torch(path, specs)
    head, slots, size = _plan_safetensors(path, specs)
    with path.open("xb") as file:
        file.write(head)
        file.truncate(size)
    return slots


def find_layout(path: Path, specs: Sequence[TensorSpec]) -> list[Slot]:
    """Return the slots of a file that lay_out made earlier.

    Raises:
        ResumeError: it is missing, or was laid out for other tensors.
    """
    try:
        slots = _find_torch(path, specs) if path.suffix.lower() == ".pt" else _find_safetensors(path, specs)
    except (OSError, CheckpointError, zipfile.BadZipFile):
        slots = None
    if slots is None:
        raise ResumeError(f"{path}: not what this run would continue; run again without --resume to start over")
    return slots


def _plan_safetensors(path: Path, specs: Sequence[TensorSpec]) -> tuple[bytes, list[Slot], int]:
    """Header, slots and file size. Wide types first: a reader that views the bytes in place needs them aligned."""
    ordered = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].bits)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends, end = [], 0
    for spec in ordered:
        offsets = [end, end := end + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
        ends.append(end)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")
    text += b" " * (-len(text) % _ALIGN)
    head = len(text).to_bytes(8, "little") + text
    slots = [Slot(spec, path, len(head) + stop - spec.nbytes) for spec, stop in zip(ordered, ends, strict=True)]
    return head, slots, len(head) + end


def _find_safetensors(path: Path, specs: Sequence[TensorSpec]) -> list[Slot] | None:
    head, slots, size = _plan_safetensors(path, specs)
    with path.open("rb") as file:
        return slots if file.read(len(head)) == head and path.stat().st_size == size else None


def _lay_out_torch(path: Path, specs: Sequence[TensorSpec]) -> list[Slot]:
    """torch.save itself writes the file, from tensors without memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {spec.name: torch.empty(spec.shape, dtype=spec.torch_dtype, device="cpu") for spec in specs}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(tensors, path)
        slots = _torch_slots(path, specs)
    except (RuntimeError, zipfile.BadZipFile) as error:  # torch's writer hides the system's error, or all of it
        code = _hidden_errno(path, sum(spec.nbytes for spec in specs))
        raise OSError(code, str(error).splitlines()[0]) from None
    if slots is None:
        raise RuntimeError(f"{path}: torch {torch.__version__} lays tensors out in an order that is not known here")
    return slots


def _hidden_errno(path: Path, nbytes: int) -> int:
    """Return the error number of a plain file of that size at the same place, or 0 if one can be made."""
    try:
        with path.open("wb") as file:
            file.seek(nbytes)
            file.write(bytes(65536))
    except OSError as error:
        return error.errno or 0
    return 0


def _find_torch(path: Path, specs: Sequence[TensorSpec]) -> list[Slot] | None:
    from fisherkit.checkpoint.pickles import load_torch_file

    found = [(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in load_torch_file(path).items()]
    if found != [(spec.name, spec.dtype, spec.shape) for spec in specs]:
        return None
    return _torch_slots(path, specs)


def _torch_slots(path: Path, specs: Sequence[TensorSpec]) -> list[Slot] | None:
    """Storage ``data/<i>`` of the zip belongs to the i-th tensor."""
    records = _storages(path)
    sizes = {number: record.file_size for number, record in records.items()}
    if sizes != {number: spec.nbytes for number, spec in enumerate(specs)}:
        return None
    with path.open("rb") as file:
        return [Slot(spec, path, data_offset(file.fileno(), records[n])) for n, spec in enumerate(specs)]


def _storages(path: Path) -> dict[int, zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        named = ((re.fullmatch(r"[^/]+/data/(\d+)", record.filename), record) for record in archive.infolist())
        return {int(match[1]): record for match, record in named if match}


def data_offset(descriptor: int, record: zipfile.ZipInfo) -> int:
    """Return where a record's bytes start: past its own header, whose name and padding can be longer than listed.

    Raises:
        ValueError: the file ends before that.
    """
    found = os.pread(descriptor, 4, record.header_offset + 26)
    if len(found) < 4:
        raise ValueError(f"the header of {record.filename!r} is missing")
    name_bytes, extra_bytes = struct.unpack("<HH", found)
    return int(record.header_offset + 30 + name_bytes + extra_bytes)


def checksum(path: Path, offset: int, nbytes: int) -> int:
    """CRC-32 of a byte range, read in blocks."""
    crc = 0
    with path.open("rb") as file:
        file.seek(offset)
        for start in range(0, nbytes, _BLOCK_BYTES):
            crc = zlib.crc32(file.read(min(_BLOCK_BYTES, nbytes - start)), crc)
    return crc


def write_checksums(slots: Sequence[Slot], checksums: Mapping[str, int]) -> None:
    """Put the CRC-32 of the tensors' bytes into a laid out `.pt`, which has zeros there.

    torch does not look at them; unzip and everything else that tests archives does. ``slots`` are those of one
    file, in its order; tensors without an entry in ``checksums`` are left alone.
    """
    path = slots[0].file
    directory = _directory_offsets(path)
    with path.open("r+b") as file:
        for number, slot in enumerate(slots):
            if slot.spec.name not in checksums or not slot.spec.nbytes:
                continue
            crc = struct.pack("<I", checksums[slot.spec.name])
            end = slot.offset + slot.spec.nbytes
            if os.pread(file.fileno(), 4, end) == b"PK\x07\x08":  # the descriptor behind the data repeats it
                os.pwrite(file.fileno(), crc, end + 4)
            os.pwrite(file.fileno(), crc, directory[number] + 16)


def _directory_offsets(path: Path) -> dict[int, int]:
    """Return where the zip's central directory describes each storage."""
    with zipfile.ZipFile(path) as archive:
        start, records = archive.start_dir, archive.infolist()
    with path.open("rb") as file:
        file.seek(start)
        directory = file.read()
    found, at = {}, 0
    for record in records:
        match = re.fullmatch(r"[^/]+/data/(\d+)", record.filename)
        if match:
            found[int(match[1])] = start + at
        at += 46 + sum(struct.unpack_from("<HHH", directory, at + 28))
    return found
