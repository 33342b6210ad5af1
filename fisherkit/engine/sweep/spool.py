"""Spool of tensors (hidden states between groups): on disk, and in memory as far as the budget goes."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.checkpoint.atomic import disk_errors
from fisherkit.errors import ResumeError


class Spool:
    """Lists of tensors under names, written behind each other to one file; the newest also kept in memory.

    The file is what a resumed run reads. While the tensors of all spools fit ``Budget``, reading does not touch it.
    """

    def __init__(self, path: Path, budget: "Budget") -> None:
        self.path = path
        self._budget = budget
        self._kept: dict[str, list[Tensor]] = {}
        self._index: dict[str, dict[str, Any]] = {}
        self._file: io.BufferedIOBase | None = None

    @classmethod
    def reopen(cls, path: Path, budget: "Budget") -> "Spool":
        """Open a finished spool of an earlier process."""
        spool = cls(path, budget)
        try:
            spool._index = json.loads(path.with_suffix(".json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ResumeError(f"{path.with_suffix('.json')}: damaged; start again without --resume") from error
        return spool

    def put(self, name: str, tensors: Sequence[Tensor], note: Any = None) -> None:
        """Append tensors; ``note`` (JSON) comes back with them."""
        tensors = [tensor.detach().to("cpu").contiguous() for tensor in tensors]
        with disk_errors(self.path):
            if self._file is None:
                self._file = self.path.open("wb")
            entries = []
            for tensor in tensors:
                entries.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._file.tell()])
                self._file.write(_bytes(tensor))
        self._index[name] = {"tensors": entries, "note": note}
        if self._budget.take(sum(tensor.nbytes for tensor in tensors)):
            self._kept[name] = tensors

    def get(self, name: str) -> tuple[list[Tensor], Any]:
        """Return fresh copies of the tensors, on the CPU, and their note."""
        entry = self._index[name]
        if name in self._kept:
            return [tensor.clone() for tensor in self._kept[name]], entry["note"]
        if self._file is not None:
            self._file.flush()
        with self.path.open("rb") as file:
            return [_read(file, *place) for place in entry["tensors"]], entry["note"]

    def finish(self) -> None:
        """Put everything on the disk, so that another process can reopen the spool."""
        with disk_errors(self.path):
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._file = None
            with self.path.with_suffix(".json").open("w", encoding="utf-8") as file:
                json.dump(self._index, file)
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Let go of the file; what was not finished does not count."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported already
                self._file.close()
            self._file = None

    def remove(self) -> None:
        """Give back memory and disk."""
        self.close()
        self._budget.give(sum(tensor.nbytes for tensors in self._kept.values() for tensor in tensors))
        self._kept.clear()
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".json").unlink(missing_ok=True)


class Budget:
    """Bytes of memory that spools may share."""

    def __init__(self, limit_bytes: int) -> None:
        self.left = limit_bytes

    def take(self, count: int) -> bool:
        """Take ``count`` bytes if they are there."""
        if count > self.left:
            return False
        self.left -= count
        return True

    def give(self, count: int) -> None:
        """Give bytes back."""
        self.left += count


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _read(file: io.BufferedReader, dtype: str, shape: list[int], start: int) -> Tensor:
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    if tensor.numel():
        file.seek(start)
        view = tensor.reshape(-1).view(torch.uint8).numpy()
        if file.readinto(view.data) != view.nbytes:
            raise ResumeError(f"{file.name}: shorter than its index; start again without --resume")
    return tensor
