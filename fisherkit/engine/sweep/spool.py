"""Spool of tensors (hidden states between groups): on disk, and in memory as far as the budget goes."""

import contextlib
import io
import json
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.checkpoint.atomic import disk_errors
from fisherkit.engine.model.copies import HostCopy, host_bytes, host_memory, to_device, to_host
from fisherkit.errors import ResumeError

MOST_COMING = 4
"""Entries that may be on their way to the disk before another is taken: so far may the host be ahead of a device."""


class Spool:
    """Lists of tensors under names, written behind each other to one file; the newest also kept in memory.

    The file is what a resumed run reads. While the tensors of all spools fit ``Budget``, reading does not touch it.
    """

    def __init__(self, path: Path, budget: "Budget") -> None:
        self.path = path
        self._budget = budget
        self._kept: dict[str, list[Tensor]] = {}
        self._taken = 0  # bytes of the budget
        self._index: dict[str, dict[str, Any]] = {}
        self._file: io.BufferedIOBase | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")  # which begins with the first use
        self._coming: deque[Future[None]] = deque()
        self._settling = threading.Lock()

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
        """Append tensors; ``note`` (JSON) comes back with them. Those of a device are waited for on another thread."""
        copy = to_host(tensors)
        if copy.arrived is None:
            self._write(name, copy, note)
            return
        while len(self._coming) >= MOST_COMING:
            self._coming.popleft().result()
        self._coming.append(self._writer.submit(self._write, name, copy, note))

    def get(self, name: str, device: torch.device) -> tuple[list[Tensor], Any]:
        """Return fresh copies of the tensors, on ``device``, and their note."""
        self._settle()
        entry = self._index[name]
        if name in self._kept:
            kept = self._kept[name]
            copies = [tensor.clone() if device.type == "cpu" else to_device(tensor, device) for tensor in kept]
            return copies, entry["note"]
        with self.path.open("rb") as file:
            read = [_read(file, dtype, shape, start, device) for dtype, shape, start in entry["tensors"]]
        return [to_device(tensor, device) for tensor in read], entry["note"]

    def finish(self) -> None:
        """Put everything on the disk, so that another process can reopen the spool; meanwhile others may ``get``."""
        with disk_errors(self.path):
            self._settle()
            if self._file is not None:
                os.fsync(self._file.fileno())
                with self._settling:
                    self._file.close()
                    self._file = None
            with self.path.with_suffix(".json").open("w", encoding="utf-8") as file:
                json.dump(self._index, file)
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Let go of the file; what was not finished does not count."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported already
                self._file.close()
            self._file = None

    def remove(self) -> None:
        """Give back memory and disk."""
        self.close()
        self._budget.give(self._taken)
        self._taken = 0
        self._kept.clear()
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".json").unlink(missing_ok=True)

    def _settle(self) -> None:
        """Wait until all that was put is written and can be read; any thread may ask."""
        with disk_errors(self.path), self._settling:
            while self._coming:
                self._coming[0].result()  # and stays, so that whoever asks hears of an error
                self._coming.popleft()
            if self._file is not None:
                self._file.flush()

    def _write(self, name: str, copy: HostCopy, note: Any) -> None:
        tensors = copy.wait()
        with disk_errors(self.path):
            if self._file is None:
                self._file = self.path.open("wb")
            entries = []
            for tensor in tensors:
                entries.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._file.tell()])
                self._file.write(_bytes(tensor))
        self._index[name] = {"tensors": entries, "note": note}
        nbytes = sum(host_bytes(tensor, copy.device) for tensor in tensors)
        if self._budget.take(nbytes):
            self._taken += nbytes
            self._kept[name] = tensors


class Budget:
    """Bytes of memory that spools may share, whatever threads they write on."""

    def __init__(self, limit_bytes: int) -> None:
        self.left = limit_bytes
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Take ``count`` bytes if they are there."""
        with self._lock:
            if count > self.left:
                return False
            self.left -= count
            return True

    def give(self, count: int) -> None:
        """Give bytes back."""
        with self._lock:
            self.left += count


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _read(file: io.BufferedReader, dtype: str, shape: list[int], start: int, device: torch.device) -> Tensor:
    tensor = host_memory(shape, getattr(torch, dtype), device)
    if tensor.numel():
        file.seek(start)
        view = tensor.reshape(-1).view(torch.uint8).numpy()
        if file.readinto(view.data) != view.nbytes:
            raise ResumeError(f"{file.name}: shorter than its index; start again without --resume")
    return tensor
