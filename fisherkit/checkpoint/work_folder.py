"""The work folder ``<out>.partial/``: what a run has finished, on disk, so that a killed run can go on.

``progress.json`` is replaced in one step after the data that it speaks of is on the disk; whatever it does not
mention never happened.
"""

import errno
import io
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
