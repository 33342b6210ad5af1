"""Work folder of several processes: the first one's, in which each has a folder for what only it needs.

    out.partial/progress.json     what all have finished; written by rank 0, once everyone's share is on the disk
    out.partial/output/           the staged files, which all ranks fill
    out.partial/rank-K/           what crosses the borders of groups, of the samples of rank K
    out.partial/rank-K/run.json   which run it belongs to

On machines that share no file system each rank has its own out.partial/rank-K there, and nothing else.
"""

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisherkit.checkpoint.atomic import disk_errors, write_json
from fisherkit.checkpoint.work_folder import Work
from fisherkit.errors import ResumeError

if TYPE_CHECKING:
    from fisherkit.engine.ranks.group import RankGroup

OWNER = "run.json"
_LOOK_SECONDS = 3.0  # a network's file system may show a new file late


class FollowerWork(Work):
    """What a rank other than the first sees of the work folder: it notes nothing there, and holds no lock."""

    def __init__(self, folder: Path, progress: Mapping[str, Any]) -> None:
        self.folder = folder
        self.progress = dict(progress)

    def __exit__(self, *_: object) -> None:
        """Do nothing: rank 0 closes the folder."""

    @property
    def staging(self) -> Path:
        """Folder of the staged files, which rank 0 has made."""
        return self.folder / "output"

    def commit(self, **changes: Any) -> None:
        """Remember what rank 0 notes."""
        self.progress.update(changes)

    def remove(self) -> None:
        """Leave the folder to rank 0."""


def sees_folder(folder: Path, ranks: "RankGroup") -> bool:
    """Return whether this rank sees the folder of rank 0, and not one of the same name on another machine."""
    token = ranks.from_first(lambda: secrets.token_hex(8))
    probe = folder / f"seen-{token}"
    if ranks.is_first:
        with disk_errors(probe):
            probe.touch()
    ranks.gather(None)
    until = time.monotonic() + _LOOK_SECONDS
    while not (seen := probe.exists()) and folder.is_dir() and time.monotonic() < until:
        time.sleep(0.1)
    ranks.gather(None)
    if ranks.is_first:
        probe.unlink(missing_ok=True)
    return seen


def claim_spools(folder: Path, rank: int, progress: Mapping[str, Any]) -> None:
    """Make the folder of this rank, or find it as the killed run that is gone on with left it.

    Raises:
        ResumeError: that run's folder is not here.
        OutputError: the folder cannot be made.
    """
    own, run = folder / f"rank-{rank}", {"run": progress["run"]}
    going_on = "publishing" not in progress and any(name in progress for name in ("forward", "resident"))
    with contextlib.suppress(OSError, ValueError):
        if json.loads((own / OWNER).read_bytes()) == run:
            return
    if going_on:
        raise ResumeError(
            f"{own}: is not that of the killed run; put its ranks on the same machines again, or start again without "
            "--resume"
        )
    with disk_errors(own):
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
    write_json(own / OWNER, run)


def drop_spools(folder: Path, rank: int, *, alone: bool) -> None:
    """Remove the folder of this rank, and the work folder where nothing else is in it."""
    shutil.rmtree(folder / f"rank-{rank}", ignore_errors=True)
    if alone:
        with contextlib.suppress(OSError):
            folder.rmdir()
