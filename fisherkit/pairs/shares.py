"""Shares of one checkpoint that several processes write, each some of its files; the last one puts them together.

A share lies in ``OUT.part-3-of-16``, a work folder like that of any run: its files stand where one process would have
put them. Once all are complete, whoever finds it so moves the files into ``OUT.partial``, as if a run had been killed
when every tensor was written; going on with that one makes index and side files, and renames OUT into place. All
processes must see the same folder.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.atomic import disk_errors
from fisherkit.checkpoint.headers import read_header
from fisherkit.checkpoint.work_folder import STAGING, Work, is_remains, read_progress
from fisherkit.errors import CheckpointError, OptionError, OutputError
from fisherkit.kernels.deal import deal
from fisherkit.options.part import Part
from fisherkit.pairs.outputs import COMPLETE, PROGRESS, Targets
from fisherkit.pairs.reader import Tensors
from fisherkit.pairs.rewrite import Rewrite, open_writer
from fisherkit.pairs.shards import plan_shards

Files = Sequence[tuple[str, Sequence[str]]]
"""Names of files, and of the tensors in each."""


def files_by_share(tensors: Tensors, shard_bytes: int | None, of: int) -> dict[Part, Files]:
    """Return the files of the output that each share has to write: of about as many bytes, as far as files allow.

    Args:
        tensors: give the sizes.
        shard_bytes: largest file; None for the base's own division.
        of: number of shares.

    Returns:
        Shares without a file, where there are more of them than files, are left out.
    """
    files = plan_shards(tensors.checkpoints.base.index, shard_bytes)
    sizes = [sum(tensors.info(name).nbytes for name in names) for _, names in files]
    dealt = enumerate(deal(sizes, of), start=1)
    return {Part(number, of): [files[at] for at in own] for number, own in dealt if own}


@contextmanager
def writing_share(
    tensors: Tensors, targets: Targets, part: Part, files: Files, fingerprint: Mapping[str, str], *, resume: bool
) -> Iterator[Rewrite | None]:
    """Lay out a share of a checkpoint; it counts as complete after the ``with``. None where it was complete already.

    Args:
        tensors: both checkpoints.
        targets: of the whole output.
        part: which share.
        files: its own; at least one.
        fingerprint: what all shares must have in common.
        resume: go on with what a killed process left of this share.

    Raises:
        OutputError: the disk is full, or another process makes this share.
        ResumeError: what is there belongs to another run.
    """
    folder = _folder(targets, part)
    complete = _is_complete(folder, fingerprint)
    with (Work.resume(folder, fingerprint, PROGRESS) if resume or complete else None) or Work.start(
        folder, fingerprint
    ) as work:
        if complete:
            yield None
            return
        with ExitStack() as stack:
            writer = stack.enter_context(open_writer(tensors, targets, work, files))
            rewrite = Rewrite(tensors, targets, work, writer, None, force=False)
            yield rewrite
            rewrite.commit()
        work.commit(**{COMPLETE: True})


def put_together(
    tensors: Tensors,
    targets: Targets,
    shares: Mapping[Part, Files],
    fingerprint: Mapping[str, str],
    *,
    force: bool,
) -> list[str]:
    """Move the files of all shares to where a run goes on with them; nothing is done while one is missing.

    Args:
        tensors: both checkpoints.
        targets: of the whole output.
        shares: of files_by_share.
        fingerprint: what all shares must have in common.
        force: an earlier output may be replaced.

    Returns:
        The shares that are not complete, such as ``3/16``; none once all files are in place.

    Raises:
        OutputError: another process puts them together at this moment, a file of a share is damaged, or the disk fails.
    """
    folders = {part: _folder(targets, part) for part in shares}
    if is_put_together(targets, fingerprint):
        _drop(folders.values())
        return []
    missing = missing_shares(targets, shares, fingerprint)
    if missing:
        return missing
    assert targets.checkpoint is not None
    for part, folder in folders.items():
        _refuse_damaged(folder, [folder / STAGING / targets.checkpoint.name / name for name, _ in shares[part]])
    rows: dict[str, Any] = {}
    with Work.start(targets.work_folder, fingerprint, may_replace=force) as work:
        place = work.staging / targets.checkpoint.name
        with disk_errors(place):
            place.mkdir()
        for part, folder in folders.items():
            rows |= (read_progress(folder, PROGRESS) or {}).get("rows", {})
            for name, _ in shares[part]:
                with disk_errors(place / name):  # a second name, so that a kill in between loses nothing
                    os.link(folder / STAGING / place.name / name, place / name)
        names = list(tensors.checkpoints.base.index.tensors)
        work.commit(rows={name: rows[name] for name in names})
    _drop(folders.values())
    return []


def _refuse_damaged(share: Path, files: Iterable[Path]) -> None:
    """Raise OutputError for a file of a share that is not as long as its header says."""
    for file in files:
        try:
            read_header(file)
        except CheckpointError as error:
            reason = str(error).partition("; fetch")[0]  # nobody can fetch what was made here
            raise OutputError(f"{reason}; delete {share} and write that share again") from None


def missing_shares(targets: Targets, shares: Iterable[Part], fingerprint: Mapping[str, str]) -> list[str]:
    """Return the shares that are not complete, such as ``3/16``.

    Raises:
        OutputError: one is complete, and of another run.
    """
    return [str(part) for part in shares if not _is_complete(_folder(targets, part), fingerprint)]


def is_put_in_place(targets: Targets, of: int) -> bool:
    """Return whether the output is there, and of its making nothing but what is left to be tidied up."""
    work = targets.work_folder
    shares = any(_folder(targets, Part(number, of)).exists() for number in range(1, of + 1))
    return os.path.lexists(targets.main) and not shares and (not work.exists() or is_remains(work))


def _folder(targets: Targets, part: Part) -> Path:
    out = targets.checkpoint
    if out is None:
        raise OptionError("--shard writes a share of a checkpoint; give OUT")
    return out.with_name(f"{out.name}.part-{part.number}-of-{part.of}")


def _is_complete(folder: Path, fingerprint: Mapping[str, str]) -> bool:
    """Return whether a share is there and whole.

    Raises:
        OutputError: it is of another run.
    """
    progress = read_progress(folder, PROGRESS)
    if progress is None or not progress.get(COMPLETE):
        return False
    if progress["fingerprint"] != dict(fingerprint):
        raise OutputError(
            f"{folder}: is a share of a run with other options or checkpoints; give the same ones, or delete it"
        )
    return True


def is_put_together(targets: Targets, fingerprint: Mapping[str, str]) -> bool:
    """Return whether a process was killed after it had put all shares together, and before OUT was in place."""
    progress = read_progress(targets.work_folder, PROGRESS)
    return progress is not None and progress["fingerprint"] == dict(fingerprint) and bool(progress.get("rows"))


def _drop(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
