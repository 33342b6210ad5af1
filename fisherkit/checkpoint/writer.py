"""A checkpoint written tensor by tensor, in any order, in constant memory; it appears only when it is whole.

The target is laid out in a work folder beside it, filled with positioned writes (no map: its dirty pages
would count as ours), and renamed. The suffix chooses the format: `.pt`, `.safetensors`, or none for a folder
of shards with an index.
"""

import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from fisherkit.checkpoint.atomic import disk_errors, size_text, swap_in, write_text
from fisherkit.checkpoint.descriptors import OpenFiles
from fisherkit.checkpoint.layout import Slot, TensorSpec, checksum, find_layout, lay_out, write_checksums
from fisherkit.checkpoint.target import check_target, is_folder
from fisherkit.errors import OutputError
from fisherkit.floats import STORED, Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["StreamedWriter", "TensorSpec", "check_target"]

_BLOCK_ELEMENTS = 1 << 20  # rounded, summed and written while still in cache
Shards = Sequence[tuple[str, Sequence[str]]]
"""File names and the names of the tensors in each."""


class StreamedWriter:
    """Lays a target out in a work folder, is filled tensor by tensor in any order and from any thread.

    Made by ``create`` or ``reopen``; nothing is at ``target`` before ``finish``.
    """

    def __init__(self, target: Path, stem: str, slots: Sequence[Slot], work: Path) -> None:
        self._target = target
        self._stem = stem
        self._staged = work / target.name
        self._slots = {slot.spec.name: slot for slot in slots}
        self._total = sum(slot.spec.nbytes for slot in slots)
        self._files = OpenFiles(os.O_RDWR | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._written: set[str] = set()
        self._checksums: dict[str, int] = {}

    @classmethod
    def create(
        cls,
        target: Path,
        specs: Sequence[TensorSpec],
        *,
        work: Path,
        stem: str = "model",
        shard_bytes: int = 5_000_000_000,
        shards: Shards | None = None,
    ) -> Self:
        """Lay the target out afresh; what an earlier run laid out in ``work`` is dropped.

        Args:
            target: what ``finish`` will make.
            specs: the tensors, in the order they should have.
            work: folder on the target's filesystem; made if need be.
            stem: shards are named ``<stem>-00001-of-0000N.safetensors``.
            shard_bytes: largest shard; a larger tensor gets a shard of its own.
            shards: instead of ``stem`` and ``shard_bytes``, the files of a folder: each name and its tensors' names. A
                single one needs no index and gets none.

        Raises:
            OutputError: unknown suffix, no room on the disk, or ``work`` cannot be written.
            ValueError: no tensors, or two of one name.
        """
        plan = _plan_files(target, specs, work, stem, shard_bytes, shards)
        total = sum(spec.nbytes for spec in specs)
        with disk_errors(target, total):
            _make_room(target, work, total)
            slots = [slot for path, part in plan for slot in lay_out(path, part)]
        return cls(target, "" if shards is not None and len(shards) == 1 else stem, slots, work)

    @classmethod
    def reopen(
        cls,
        target: Path,
        specs: Sequence[TensorSpec],
        *,
        work: Path,
        stem: str = "model",
        shard_bytes: int = 5_000_000_000,
        shards: Shards | None = None,
    ) -> Self:
        """Continue to fill what ``create`` laid out in an earlier process, with the same arguments.

        Which tensors that process wrote is for the caller to know; see ``mark_written``.

        Raises:
            ResumeError: the files in ``work`` are missing, or of another layout.
            OutputError: unknown suffix.
            ValueError: no tensors, or two of one name.
        """
        plan = _plan_files(target, specs, work, stem, shard_bytes, shards)
        slots = [slot for path, part in plan for slot in find_layout(path, part)]
        return cls(target, "" if shards is not None and len(shards) == 1 else stem, slots, work)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, name: str, tensor: "Tensor") -> None:
        """Put one tensor in its place; a second time overwrites.

        A floating tensor is rounded to the floating type of its spec (to nearest, NaN stays NaN), block by
        block; other differences are mistakes of the caller.

        Raises:
            OutputError: the disk is full or cannot be written; what was written before is kept.
            ValueError: not a tensor of this layout, or of another shape or kind; or the writer is closed.
        """
        slot = self._slot_for(name, tensor)
        crc, at = 0, slot.offset
        with disk_errors(self._target, self._total):
            for block in _blocks(tensor, slot.spec.torch_dtype):
                if slot.file.suffix.lower() == ".pt":
                    crc = zlib.crc32(block, crc)
                self._files.write(slot.file, block, at)
                at += len(block)
        with self._lock:
            self._written.add(name)
            self._checksums[name] = crc

    def write_stored(self, name: str, elements: Stored, start: int = 0) -> None:
        """Put stored elements (see fisherkit.floats) in their place in a `.safetensors` target, from ``start`` on.

        Parts may be written in any order and by any thread; ``mark_written`` says that a tensor is whole.

        Raises:
            OutputError: the disk is full or cannot be written.
            ValueError: not a tensor of this layout, of another type or beyond its end; or the writer is closed.
        """
        slot = self._slot(name)
        at = start * elements.itemsize
        if elements.dtype != STORED[slot.spec.dtype] or not 0 <= at <= at + elements.nbytes <= slot.spec.nbytes:
            raise ValueError(
                f"tensor {name!r}: {elements.size} of {elements.dtype} from {start} on do not fit its slot"
            )
        if slot.file.suffix.lower() == ".pt":
            raise ValueError(f"{slot.file}: parts of tensors can only be written to safetensors")
        with disk_errors(self._target, self._total):
            view = np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
            self._files.write(slot.file, view.data, slot.offset + at)

    def dtype_of(self, name: str) -> "torch.dtype":
        """Return the type that a tensor is stored in."""
        dtype: torch.dtype = self._slot(name).spec.torch_dtype
        return dtype

    @property
    def staged(self) -> Path:
        """Place of the output until ``finish`` renames it; what a folder should hold besides shards is put there."""
        return self._staged

    def checksums(self, names: Iterable[str]) -> dict[str, int]:
        """Return the checksums of tensors that ``write`` has written, for ``mark_written`` in another process."""
        with self._lock:
            return {name: self._checksums[name] for name in names}

    def mark_written(self, names: Iterable[str], checksums: Mapping[str, int] | None = None) -> None:
        """Count tensors as written: their parts were, or another process wrote them.

        Args:
            names: of the tensors; what an earlier process wrote was synced.
            checksums: of tensors, so that they need not be read back.

        Raises:
            ValueError: a name that is not in this layout.
        """
        names = set(names)
        unknown = sorted(names - self._slots.keys())
        if unknown:
            raise ValueError(f"{self._target}: has no tensor {unknown[0]!r}")
        with self._lock:
            self._written |= names
            self._checksums |= checksums or {}

    def sync(self) -> None:
        """Return when everything written so far is on the disk.

        Raises:
            OutputError: the disk is full or failed.
        """
        with disk_errors(self._target, self._total):
            for file in self._paths():
                os.fsync(self._files.descriptor(file))

    def seal(self) -> tuple[str, ...]:
        """Complete and sync what is staged, index and checksums included; the writer is closed then.

        Returns:
            The names of the files: the target's own, or those inside of a folder.

        Raises:
            OutputError: the disk is full or failed. The work folder is kept.
            RuntimeError: a tensor was never written.
        """
        absent = self._slots.keys() - self._written
        if absent:
            raise RuntimeError(f"{self._target}: {len(absent)} tensors were never written, such as {min(absent)!r}")
        names = [path.name for path in self._paths()]
        with disk_errors(self._target, self._total):
            self._complete_checksums()
            self.sync()
            if self._staged.is_dir() and self._stem:
                names.append(self._write_index())
            self.close()
        return tuple(names)

    def finish(self, *, force: bool = False) -> tuple[Path, ...]:
        """Seal, and rename into place; return the files made.

        Args:
            force: replace what is at the target; it is there until the new one is.

        Raises:
            OutputError: the target exists, the disk is full or failed. The work folder is kept.
            RuntimeError: a tensor was never written.
        """
        check_target(self._target, force=force)
        names = self.seal()
        with disk_errors(self._target, self._total):
            swap_in(self._staged, self._target)
        return tuple(self._target / name for name in names) if self._target.is_dir() else (self._target,)

    def close(self) -> None:
        """Close the files; what is in the work folder stays, for ``reopen``."""
        self._files.close()

    def _slot(self, name: str) -> Slot:
        slot = self._slots.get(name)
        if slot is None:
            raise ValueError(f"{self._target}: has no tensor {name!r}")
        return slot

    def _slot_for(self, name: str, tensor: "Tensor") -> Slot:
        slot = self._slot(name)
        same_kind = tensor.dtype.is_floating_point and slot.spec.torch_dtype.is_floating_point
        if tuple(tensor.shape) != slot.spec.shape or not (tensor.dtype == slot.spec.torch_dtype or same_kind):
            raise ValueError(
                f"tensor {name!r}: laid out as {slot.spec.dtype} {list(slot.spec.shape)}, "
                f"given {tensor.dtype} {list(tensor.shape)}"
            )
        return slot

    def _paths(self) -> list[Path]:
        return list(dict.fromkeys(slot.file for slot in self._slots.values()))

    def _complete_checksums(self) -> None:
        """Read back only what an earlier process wrote."""
        if self._staged.suffix.lower() != ".pt":
            return
        slots = list(self._slots.values())
        for slot in slots:
            if slot.spec.name not in self._checksums:
                self._checksums[slot.spec.name] = checksum(slot.file, slot.offset, slot.spec.nbytes)
        write_checksums(slots, self._checksums)

    def _write_index(self) -> str:
        weight_map = {name: slot.file.name for name, slot in self._slots.items()}
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        path = self._staged / f"{self._stem}.safetensors.index.json"
        write_text(path, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
        return path.name


def _plan_files(
    target: Path, specs: Sequence[TensorSpec], work: Path, stem: str, shard_bytes: int, given: Shards | None
) -> list[tuple[Path, list[TensorSpec]]]:
    """Return the files of the target inside ``work``, and the tensors of each."""
    names = [spec.name for spec in specs]
    if not specs or len(set(names)) < len(names) or "__metadata__" in names:
        raise ValueError(f"{target}: needs tensors, each with a name of its own")
    if not is_folder(target):
        return [(work / target.name, list(specs))]
    if given is not None:
        by_name = {spec.name: spec for spec in specs}
        return [(work / target.name / file, [by_name.pop(name) for name in names]) for file, names in given]
    shards: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    folder, count = work / target.name, len(shards)
    return [(folder / f"{stem}-{n:05d}-of-{count:05d}.safetensors", shard) for n, shard in enumerate(shards, start=1)]


def _make_room(target: Path, work: Path, total: int) -> None:
    """A work folder on the target's filesystem, without leftovers, with space for ``total`` bytes."""
    work.mkdir(parents=True, exist_ok=True)
    if work.stat().st_dev != target.absolute().parent.stat().st_dev:
        raise OutputError(f"{work}: not on the filesystem of {target}, so it could not be renamed")
    staged = work / target.name
    if staged.is_dir():
        shutil.rmtree(staged)
    staged.unlink(missing_ok=True)
    if is_folder(target):
        staged.mkdir()
    free = shutil.disk_usage(work).free
    if free < total:
        raise OutputError(f"{target}: needs {size_text(total)}, and {size_text(free)} are free on this disk")


def _blocks(tensor: "Tensor", dtype: "torch.dtype") -> Iterator[memoryview]:
    """Yield the tensor's bytes in ``dtype``, a few MB at a time; rounded where it lives, then moved to the host."""
    import torch

    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
        block = flat[start : start + _BLOCK_ELEMENTS].to(dtype).cpu()
        yield block.view(torch.uint8).numpy().data
