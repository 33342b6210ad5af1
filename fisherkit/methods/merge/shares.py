"""One share of a checkpoint that several processes of ``fapm`` or ``merge`` write; see pairs.shares."""

import shutil
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fisherkit.errors import OptionError, counted, some_names
from fisherkit.methods.merge.pair_run import Run
from fisherkit.options import MergeOptions, PairOptions
from fisherkit.options.part import Part
from fisherkit.pairs.outputs import Targets, check_targets
from fisherkit.pairs.rewrite import Changed, TensorRow
from fisherkit.pairs.shares import (
    files_by_share,
    is_put_in_place,
    is_put_together,
    missing_shares,
    put_together,
    writing_share,
)


class Share(NamedTuple):
    """What became of a share.

    Attributes:
        rows: of its tensors.
        missing: shares that are not complete.
        is_last: the files of all shares are where a run goes on with them, and this process does.
    """

    rows: Mapping[str, TensorRow]
    missing: tuple[str, ...]
    is_last: bool


def check_share(options: PairOptions, *, sparse: bool = False) -> None:
    """Refuse options under which a share would need to know what becomes of the others.

    Args:
        options: of the command, with a shard.
        sparse: a sparse delta is asked for.

    Raises:
        OptionError: see above.
    """
    if sparse:
        raise OptionError("--shard writes files of a checkpoint; --sparse goes without it")
    if isinstance(options, MergeOptions) and options.lora_rank is not None:
        raise OptionError("--lora-rank makes an adapter of all tensors; it goes without --shard")


def write_share(
    run: Run,
    targets: Targets,
    options: PairOptions,
    marks: Mapping[str, str],
    start: Callable[[], Callable[[str], Changed]],
    *,
    in_order: bool = False,
) -> Share:
    """Write a share, and put all of them together if it was the last.

    Args:
        run: BASE and FT.
        targets: of the whole output.
        options: name the share.
        marks: fingerprint of the run.
        start: called where there is something to write, for a function from a name to the tensor as it is to be
            written; what becomes of a tensor must not depend on others that were written before it.
        in_order: one tensor takes much more memory than it has, so that threads take one after the other.

    Raises:
        CheckpointError: what ``start`` and its function raise.
        OutputError: the output exists already, the disk is full, or another process makes this share.
        ResumeError: what is there belongs to another run.
    """
    assert options.shard is not None
    part, rows = Part(*options.shard), {}
    shares = files_by_share(run.tensors, options.shard_bytes, part.of)
    files = shares.get(part, ())
    was_killed = targets.work_folder.exists()
    if is_put_in_place(targets, part.of) and (was_killed or not files):  # while it tidied up; or by the others
        shutil.rmtree(targets.work_folder, ignore_errors=True)
        run.request.say(f"share {part} has nothing left to write: {targets.main} is there")
        return Share({}, (), is_last=False)
    check_targets(targets, marks, force=options.force, resume=True)
    missing_shares(targets, shares, marks)  # refuses those of another run before anything is written
    if files and not is_put_together(targets, marks):  # else a process was killed after that
        names = [name for _, own in files for name in own]
        with writing_share(run.tensors, targets, part, files, marks, resume=options.resume) as rewrite:
            if rewrite is not None:
                rewrite.write_all(names, start(), run.request.track, in_order=in_order)
                rows = dict(rewrite.rows)
    missing = put_together(run.tensors, targets, shares, marks, force=options.force)
    if missing:
        done = f"share {part} is written" if files else f"share {part} has no file to write"
        run.request.say(f"{done}; {counted(len(missing), 'share')} missing: {some_names(missing, 8)}")
    return Share(rows, tuple(missing), is_last=not missing)
