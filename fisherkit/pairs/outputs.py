"""Outputs of one run: a checkpoint, a sparse delta, files beside them. They appear together, when all are finished.

Everything is finished in the work folder first. A note in its progress then says so, and everything is renamed to its
place, the checkpoint last. A run that is killed in between is completed by the same command, with --resume or without:
what was renamed already is its own, and no obstacle.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherkit.artefacts.sparse_delta import check_sidecar, sidecar_of
from fisherkit.checkpoint.atomic import disk_errors, publish, write_bytes
from fisherkit.checkpoint.schema import anything, flag, listed, maybe, named, number, shape, table, text, whole
from fisherkit.checkpoint.target import check_file, check_target
from fisherkit.checkpoint.work_folder import MAY_REPLACE, STAGING, Work, is_remains, read_progress
from fisherkit.errors import OutputError, ResumeError
from fisherkit.pairs.pair import Pair

BESIDE, DELTA = "beside", "delta"
"""Folders of the work folder for finished files beside the checkpoint, and for a finished delta."""
COMPLETE = "complete"
"""Key of the progress of a share of the output (see pairs.shares): all of its files are written."""
FINISHED = "finished"
"""Key of the progress: names of everything that was finished, by their places in the work folder."""

_COUNTS = ("weights", "kept", "zero_deltas", "nonfinite")
_ROW = table(
    {**dict.fromkeys(_COUNTS, whole()), "energy": number(0), "energy_kept": number(0), "shape": shape},
    {"threshold": maybe(number()), "ties": whole(), "changed": whole(), "rounded_away": whole(), "unrelated": flag},
)


def _row_or_nothing(value: Any, where: str) -> None:
    """Rule for the row of a tensor; empty for one that does not take part."""
    if value != {}:
        _ROW(value, where)


PROGRESS = table(
    {},
    {
        "rows": named(_row_or_nothing),
        "delta": table({"bytes": whole(), "tensors": listed(listed(anything, 3))}),
        "files": listed(text()),
        FINISHED: listed(text()),
        COMPLETE: flag,
    },
)
"""What the work folder of a run may say; see checkpoint.schema."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Places of the outputs of one run; at least one.

    Attributes:
        checkpoint: folder or ``.safetensors`` file.
        delta: ``.safetensors`` file, with a JSON beside it.
        beside: reports and figures.
    """

    checkpoint: Path | None = None
    delta: Path | None = None
    beside: tuple[Path, ...] = ()

    @property
    def main(self) -> Path:
        """Output that the work folder is named after."""
        return next(path for path in (self.checkpoint, self.delta, *self.beside) if path is not None)

    @property
    def work_folder(self) -> Path:
        """Folder in which the outputs are made."""
        return self.main.parent / f"{self.main.name}.partial"

    @property
    def around(self) -> tuple[Path, ...]:
        """Files beside the checkpoint: all others."""
        return (*((sidecar_of(self.delta), self.delta) if self.delta is not None else ()), *self.beside)

    def staged(self) -> dict[str, Path]:
        """Return the target of every output by its place in the work folder, in the order in which they appear."""
        found: dict[str, Path] = {}
        if self.delta is not None:
            found |= {f"{DELTA}/{path.name}": path for path in (sidecar_of(self.delta), self.delta)}
        for path in self.beside:
            same = sum(name.endswith(f"/{path.name}") for name in found)  # of the same name in other folders
            found[f"{BESIDE}/{same}/{path.name}"] = path
        if self.checkpoint is not None:
            found[f"{STAGING}/{self.checkpoint.name}"] = self.checkpoint
        return found


def check_output(out: Path, pair: Pair) -> None:
    """Refuse a checkpoint that is one of the inputs, lies in one, or holds one.

    Args:
        out: the target.
        pair: the inputs.

    Raises:
        OutputError: see above.
    """
    target, work = out.resolve(), Targets(checkpoint=out).work_folder
    for role, source in (("BASE", pair.base_source), ("FT", pair.tuned_source)):
        path = source.path.resolve()
        if target == path or target in path.parents or path in target.parents:
            raise OutputError(f"{out}: is {role} itself, or one lies inside of the other; choose another output")
        if work.resolve() in path.parents:
            raise OutputError(f"{out}: {role} lies in {work}, where the output is made; move it away first")
    if re.fullmatch(r"\.[a-z]+", out.suffix.lower()) and out.suffix.lower() != ".safetensors":
        raise OutputError(f"{out}: models are written as safetensors; give a folder's name, or one in .safetensors")


def check_targets(targets: Targets, fingerprint: Mapping[str, str], *, force: bool, resume: bool) -> bool:
    """Refuse targets that are taken, before any work; what a killed run of the same fingerprint put there is not.

    Args:
        targets: of the run.
        fingerprint: of the run.
        force: earlier outputs may be replaced.
        resume: a killed run is to be gone on with.

    Returns:
        True if what lies at the targets may be replaced.

    Raises:
        OutputError: a target exists, or could not be made.
        ResumeError: the progress of the killed run is damaged.
    """
    work = targets.work_folder
    progress = _progress_of_same_run(work, fingerprint, strict=resume)
    if resume or FINISHED in progress:
        # What the killed run was allowed to replace it still is. And a run that was killed while it removed its
        # emptied work folder had put everything in place.
        force = force or progress.get(MAY_REPLACE, False) or is_remains(work)
    _check(targets, work, progress.get(FINISHED, ()), force=force)
    return force


def open_work(targets: Targets, fingerprint: Mapping[str, str], *, force: bool, resume: bool) -> Work:
    """Open the work folder: of the killed run where it is gone on with or had finished, or a fresh one.

    Args:
        targets: of the run.
        fingerprint: of the run.
        force: earlier outputs may be replaced; noted for a run that goes on with this one.
        resume: a killed run is to be gone on with.

    Raises:
        OutputError: the folder cannot be made, or another run is at work there.
        ResumeError: the folder belongs to another run.
    """
    folder = targets.work_folder
    is_finished = FINISHED in _progress_of_same_run(folder, fingerprint, strict=False)
    work = Work.resume(folder, fingerprint, PROGRESS, may_replace=force) if resume or is_finished else None
    return work or Work.start(folder, fingerprint, may_replace=force)


def publish_all(
    targets: Targets, work: Work, beside: Mapping[Path, bytes], files: Sequence[str], *, force: bool
) -> None:
    """Finish the files beside the checkpoint, note that everything is finished, and rename it into place.

    Args:
        targets: of the run; checkpoint and delta lie finished in the work folder, or were renamed already.
        work: the work folder.
        beside: contents of the reports and figures.
        files: names of the checkpoint's files, for a run that goes on with this one.
        force: earlier outputs may be replaced.

    Raises:
        OutputError: a target has appeared meanwhile, or the disk is full; the work folder is kept.
    """
    finished = work.progress.get(FINISHED, [])
    for name, path in targets.staged().items():
        if path in beside and name not in finished:
            staged = work.folder / name
            with disk_errors(staged):
                staged.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(staged, beside[path])
    work.commit(**{FINISHED: sorted({*finished, *targets.staged()}), "files": list(files)})
    _check(targets, work.folder, finished, force=force)  # again: hours may have passed
    for name, path in targets.staged().items():
        _bring(work.folder / name, path)


def _progress_of_same_run(work: Path, fingerprint: Mapping[str, str], *, strict: bool) -> dict[str, Any]:
    """Progress of a killed run of the same fingerprint; empty where there is none."""
    try:
        progress = read_progress(work, PROGRESS)
    except ResumeError:
        if strict:
            raise
        return {}
    return progress if progress is not None and progress["fingerprint"] == dict(fingerprint) else {}


def _check(targets: Targets, work: Path, finished: Sequence[str], *, force: bool) -> None:
    """Refuse targets that are taken, but for those that a killed run had ``finished`` and renamed."""
    for name, path in targets.staged().items():
        if name in finished and not os.path.lexists(work / name):
            continue  # renamed by the killed run
        if path in (targets.checkpoint, targets.delta):
            check_target(path, force=force)
        elif targets.delta is not None and path == sidecar_of(targets.delta):
            check_sidecar(targets.delta)
        else:
            check_file(path, force=force)


def _bring(staged: Path, target: Path) -> None:
    """Rename a finished output into place, unless a killed run did; across file systems, copy it first."""
    with disk_errors(target):
        if not os.path.lexists(staged) or staged.stat().st_dev == target.absolute().parent.stat().st_dev:
            publish([(staged, target)])
            return
        aside = target.with_name(f".{target.name}.{os.getpid()}.new")
        try:
            shutil.copyfile(staged, aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            publish([(aside, target)])
        finally:
            aside.unlink(missing_ok=True)
        staged.unlink()
