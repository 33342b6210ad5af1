"""Work folder ``<out>.partial/``: what a run has finished, on disk, so that a killed run can go on.

``progress.json`` is replaced in one step after the data that it speaks of is on the disk; whatever it does not
mention never happened. It is the first file made and the last one removed.
"""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fisherkit.checkpoint.atomic import disk_errors, write_bytes
from fisherkit.checkpoint.schema import MisfitError, Rule, anything, flag, named, parse_file, table, text
from fisherkit.errors import CheckpointError, OutputError, ResumeError, first_line

PROGRESS, LOCK = "progress.json", "lock"
MAY_REPLACE = "may_replace"
"""Key of the progress: the run was allowed to replace an earlier output, and whoever goes on with it is."""
STAGING = "output"
"""Folder inside of the work folder where finished files lie under their final names, apart from the run's own."""


class Work:
    """A work folder with the fingerprint of the run that it belongs to; a context that holds its lock.

    Attributes:
        folder: where the run keeps its data.
        progress: what is finished; JSON values. Changed by ``commit`` alone.
    """

    def __init__(self, folder: Path, progress: dict[str, Any]) -> None:
        self.folder = folder
        self.progress = progress
        self._held = _lock(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    @classmethod
    def start(cls, folder: Path, fingerprint: Mapping[str, str], *, may_replace: bool = False) -> "Work":
        """Make a fresh folder; what an earlier run left there is dropped.

        Args:
            folder: the work folder.
            fingerprint: what a run must have in common with one that it goes on with, by what a person would call it.
            may_replace: the run was allowed to replace an earlier output; noted, so that one that goes on with it is.

        Raises:
            OutputError: the folder cannot be made, is not ours, or another run is at work there.
        """
        try:
            if folder.exists():
                if _foreign(folder):
                    raise OutputError(f"{folder}: is in the way and no work folder of ours; choose another output")
                _lock(folder).close()
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another output") from error
        work = cls(folder, {"fingerprint": dict(fingerprint), **({MAY_REPLACE: True} if may_replace else {})})
        work.commit()
        return work

    @classmethod
    def resume(
        cls, folder: Path, fingerprint: Mapping[str, str], rule: Rule = anything, *, may_replace: bool = False
    ) -> "Work | None":
        """Open the folder of a killed run with the same fingerprint; None if there is nothing to go on with.

        Args:
            folder: the work folder.
            fingerprint: of the run that wants to go on.
            rule: for the progress; see checkpoint.schema.
            may_replace: this run is allowed to replace an earlier output; noted, as by ``start``.

        Raises:
            ResumeError: the folder belongs to other prompts, options or another model, and which of them differ; or
                its progress is damaged.
        """
        progress = read_progress(folder, rule)
        if progress is None:
            return None
        found = progress["fingerprint"]
        differing = [key for key in fingerprint.keys() | found.keys() if fingerprint.get(key) != found.get(key)]
        if differing:
            shown = [f"{key} ({found[key]})" if len(found.get(key, "")) in range(1, 12) else key for key in differing]
            raise ResumeError(
                f"{folder}: left by a run with other {', '.join(sorted(shown))}; "
                "run it with the same again, or without --resume to start over"
            )
        work = cls(folder, progress)
        if may_replace and not progress.get(MAY_REPLACE):
            work.commit(**{MAY_REPLACE: True})
        return work

    @property
    def staging(self) -> Path:
        """Folder for finished files, made where it is missing."""
        path = self.folder / STAGING
        with disk_errors(path):
            path.mkdir(exist_ok=True)
        return path

    def commit(self, **changes: Any) -> None:
        """Note what is finished, in one step; JSON values by name.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        self.progress.update(changes)
        write_bytes(self.folder / PROGRESS, json.dumps(self.progress).encode())

    def remove(self) -> None:
        """Drop the folder; the run is over. The progress goes last: until then --resume finds the run as it was."""
        for path in self.folder.iterdir():
            if path.name not in (PROGRESS, LOCK):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def read_progress(folder: Path, rule: Rule = anything) -> dict[str, Any] | None:
    """Return what a killed run noted in its work folder; None where there is no such run.

    Args:
        folder: the work folder.
        rule: for the progress, besides its fingerprint.

    Raises:
        ResumeError: the file is damaged.
    """
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        progress = parse_file(path, "the progress")
        table({"fingerprint": named(text())})(progress, "")
        table({}, {MAY_REPLACE: flag})(progress, "")
        rule(progress, "")
    except (CheckpointError, MisfitError) as error:
        raise ResumeError(
            f"{path}: not the progress of a run ({first_line(error)}); delete {folder} and start again"
        ) from error
    return dict(progress)


def may_replace(folder: Path | None, rule: Rule = anything, *, resume: bool) -> bool:
    """Return whether a run that goes on with a killed one may replace an output because that one was allowed to.

    Args:
        folder: the work folder; None where there is none.
        rule: for its progress.
        resume: the killed run is gone on with.

    Raises:
        ResumeError: its progress is damaged.
    """
    left = read_progress(folder, rule) if resume and folder is not None else None
    return bool(left and left.get(MAY_REPLACE))


def is_remains(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a run leaves that is killed while it removes its work folder."""
    return folder.is_dir() and not (folder / PROGRESS).exists() and not _foreign(folder)


def _foreign(folder: Path) -> bool:
    """Return whether a folder holds files, and none of them is the progress of a run."""
    names = {path.name for path in folder.iterdir()}
    return PROGRESS not in names and any(name != LOCK and not name.startswith(f".{PROGRESS}.") for name in names)


def _lock(folder: Path) -> io.TextIOWrapper:
    """Open a file that is locked as long as it is open, so that two runs cannot work in one folder."""
    file = (folder / LOCK).open("w", encoding="ascii")
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
