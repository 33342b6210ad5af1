"""The work folder ``<out>.partial/``: what a run has finished, on disk, so that a killed run can go on.

``progress.json`` is replaced in one step after the data that it speaks of is on the disk; whatever it does not
mention never happened.
"""

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fisherkit.errors import OutputError, ResumeError

PROGRESS, ASIDE = "progress.json", "progress.new"


class Work:
    """A work folder with the fingerprint of the run that it belongs to."""

    def __init__(self, folder: Path, progress: dict[str, Any]) -> None:
        self.folder = folder
        self.progress = progress
        self._held = _lock(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    @classmethod
    def start(cls, folder: Path, fingerprint: dict[str, str]) -> "Work":
        """A fresh folder; what an earlier run left there is dropped.

        Raises:
            OutputError: the folder cannot be made.
        """
        try:
            if folder.exists():
                if {path.name for path in folder.iterdir()} - {"lock", ASIDE} and not (folder / PROGRESS).is_file():
                    raise OutputError(f"{folder}: is in the way and no work folder of ours; choose another output")
                _lock(folder).close()
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another output") from error
        work = cls(folder, {"fingerprint": fingerprint})
        work.commit()
        return work

    @classmethod
    def resume(cls, folder: Path, fingerprint: dict[str, str]) -> "Work | None":
        """The folder of a killed run with the same fingerprint; None if there is nothing to go on with.

        Raises:
            ResumeError: the folder belongs to other prompts, options or another model, and which of them differ.
        """
        if not (folder / PROGRESS).is_file():
            return None
        try:
            progress = json.loads((folder / PROGRESS).read_text("utf-8"))
            found = dict(progress["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{folder / PROGRESS}: not the progress of a run; delete {folder} and start again"
            ) from error
        differing = [key for key in fingerprint.keys() | found.keys() if fingerprint.get(key) != found.get(key)]
        if differing:
            raise ResumeError(
                f"{folder}: left by a run with other {', '.join(sorted(differing))}; "
                "run it with the same again, or without --resume to start over"
            )
        return cls(folder, progress)

    def commit(self, **changes: Any) -> None:
        """Note what is finished, in one step."""
        self.progress.update(changes)
        path = self.folder / PROGRESS
        aside = self.folder / ASIDE
        with disk(path):
            with aside.open("w", encoding="utf-8") as file:
                json.dump(self.progress, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)

    def remove(self) -> None:
        """Drop the folder; the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _lock(folder: Path) -> io.TextIOWrapper:
    """A file that is locked as long as it is open, so that two runs cannot work in one folder."""
    file = (folder / "lock").open("w", encoding="ascii")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not Unix
        pass
    except BlockingIOError:
        file.close()
        raise OutputError(f"{folder}: another run is at work there; wait for it, or choose another output") from None
    except OSError:  # a file system without locks
        pass
    return file


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
        """A finished spool of an earlier process."""
        spool = cls(path, budget)
        try:
            spool._index = json.loads(path.with_suffix(".json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ResumeError(f"{path.with_suffix('.json')}: damaged; start again without --resume") from error
        return spool

    def put(self, name: str, tensors: Sequence[Tensor], note: Any = None) -> None:
        """Append tensors; ``note`` (JSON) comes back with them."""
        tensors = [tensor.detach().to("cpu").contiguous() for tensor in tensors]
        with disk(self.path):
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
        """Fresh copies of the tensors, on the CPU, and their note."""
        entry = self._index[name]
        if name in self._kept:
            return [tensor.clone() for tensor in self._kept[name]], entry["note"]
        if self._file is not None:
            self._file.flush()
        with self.path.open("rb") as file:
            return [_read(file, *place) for place in entry["tensors"]], entry["note"]

    def finish(self) -> None:
        """Everything is on the disk when this returns; the spool can be reopened by another process."""
        with disk(self.path):
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


class disk:  # noqa: N801 - reads as a statement: with disk(path)
    """Turns what a disk can answer (full, read-only) into one line that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "disk full" if full else str(error.strerror)
            raise OutputError(f"{self.path}: {reason}; what is finished is kept, go on with --resume") from error


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
