"""A checkpoint like BASE, written tensor by tensor, in constant memory, with resume; it appears when it is whole."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.checkpoint.target import check_target, is_folder
from fisherkit.checkpoint.work_folder import Work
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.errors import CheckpointError, OptionError, OutputError
from fisherkit.floats import Stored
from fisherkit.pairs.pair import Pair
from fisherkit.pairs.reader import Tensors
from fisherkit.progress import Track

Row = dict[str, Any]
"""What is reported of a tensor; plain values, since it goes to JSON."""
"""Progress: stage, done, total."""

_COMMIT_SECONDS = 5.0
_WRITE_BYTES = 8 << 20  # per call of the system


def work_folder(out: Path) -> Path:
    """Where an output is made."""
    return out.parent / f"{out.name}.partial"


def may_replace(out: Path, *, force: bool, resume: bool) -> bool:
    """Whether an earlier output of fisherkit's may be replaced.

    By --force; and where a run is resumed that was given it, or that was killed when all but the tidying was done.
    """
    return force or (resume and is_folder(out) and work_folder(out).is_dir())


def check_output(out: Path, pair: Pair, *, force: bool, resume: bool = False) -> None:
    """Refuse an output that is one of the inputs, lies in one, or holds one; and what check_target refuses.

    Raises:
        OutputError: see above.
    """
    target = out.resolve()
    for side, source in (("BASE", pair.base_source), ("FT", pair.tuned_source)):
        path = source.path.resolve()
        if target == path or target in path.parents or path in target.parents:
            raise OutputError(f"{out}: is {side} itself, or one lies inside of the other; choose another output")
        if work_folder(out).resolve() in path.parents:
            raise OutputError(f"{out}: {side} lies in {work_folder(out)}, where the output is made; move it away first")
    if re.fullmatch(r"\.[a-z]+", out.suffix.lower()) and out.suffix.lower() != ".safetensors":
        raise OutputError(f"{out}: models are written as safetensors; give a folder's name, or one in .safetensors")
    check_target(out, force=may_replace(out, force=force, resume=resume))


def rewrite(
    tensors: Tensors,
    out: Path,
    change: Callable[[str], tuple[Stored, Row]],
    *,
    fingerprint: Mapping[str, str],
    shard_bytes: int | None,
    resume: bool,
    force: bool,
    recall: Callable[[Mapping[str, Row]], object],
    finish: Callable[[Path | None, Mapping[str, Row]], object],
    track: Track,
) -> tuple[tuple[Path, ...], dict[str, Row]]:
    """Write ``out``: for each of BASE's tensors what ``change`` returns of it.

    Args:
        tensors: both sides.
        out: the folder (or `.safetensors` file) to make.
        change: from a name to the flat tensor to write, in the base's type, and its row of the report.
        fingerprint: what a run must have in common with one that it goes on with.
        shard_bytes: largest shard; None for the base's own division.
        resume: go on with what a killed run left.
        force: replace an earlier output.
        recall: called with the rows that a killed run left, before any other.
        finish: called when all tensors are written, with the folder that is to be renamed (None for a single file)
            and the rows; puts the other files there. If it raises, nothing appears.
        track: progress in bytes.

    Returns:
        The files of the output, and the rows by tensor.

    Raises:
        OutputError: the target exists or the disk is full.
        ResumeError: the work folder belongs to another run.
    """
    index = tensors.pair.base.index
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in index.tensors.values()]
    shards = plan_shards(index, shard_bytes) if is_folder(out) else None
    force = may_replace(out, force=force, resume=resume)
    with _open_work(out, fingerprint, resume) as work:
        rows: dict[str, Row] = dict(work.progress.get("rows", {}))
        recall(rows)
        make = StreamedWriter.reopen if rows else StreamedWriter.create
        try:
            with make(out, specs, work=work.folder, shards=shards) as writer:
                writer.mark_written(rows)
                _write_all(tensors, change, writer, work, rows, track)
                finish(writer.staged if is_folder(out) else None, rows)
                files = writer.finish(force=force)
        except (CheckpointError, OptionError):
            if len(rows) == len(specs) or not work.progress.get("rows"):
                work.remove()  # the inputs were refused, and there is nothing to go on with
            raise
        work.remove()
    return files, rows


def _open_work(out: Path, fingerprint: Mapping[str, str], resume: bool) -> Work:
    folder = work_folder(out)
    if resume and (folder / out.name).exists():  # else it was killed before anything, or after everything
        found = Work.resume(folder, dict(fingerprint))
        if found is not None:
            return found
    return Work.start(folder, dict(fingerprint))


def _write_all(
    tensors: Tensors,
    change: Callable[[str], tuple[Stored, Row]],
    writer: StreamedWriter,
    work: Work,
    rows: dict[str, Row],
    track: Track,
) -> None:
    """One tensor is written, and from time to time synced, while the next one is computed."""
    names = list(tensors.pair.base.index.tensors)
    total = sum(tensors.info(name).nbytes for name in names)
    done = sum(tensors.info(name).nbytes for name in rows)
    committed = time.monotonic()

    def write(name: str, data: Stored, row: Row) -> None:
        nonlocal committed
        step = max(1, _WRITE_BYTES // data.itemsize)
        for start in range(0, data.size, step):
            writer.write_stored(name, data[start : start + step], start)
        writer.mark_written([name])
        rows[name] = row
        if time.monotonic() - committed > _COMMIT_SECONDS:
            writer.sync()
            work.commit(rows=rows)
            committed = time.monotonic()

    with ThreadPoolExecutor(1, thread_name_prefix="fisherkit-write") as behind:
        writing: Future[None] | None = None
        for name in tensors.walk([name for name in names if name not in rows]):
            track("writing", done, total)
            data, row = change(name)
            if writing is not None:
                writing.result()
            writing = behind.submit(write, name, data, row)
            if not tensors.double_buffer(data):
                writing.result()
            done += data.nbytes
        if writing is not None:
            writing.result()
    track("writing", total, total)


def plan_shards(index: CheckpointIndex, shard_bytes: int | None) -> list[tuple[str, Sequence[str]]]:
    """File names and the tensors in each: the base's own division under transformers' names, or one by size."""
    groups: list[list[str]] = []
    if shard_bytes is None:
        of = {file: [info.name for info in index.tensors.values() if info.file == file] for file in index.files}
        groups = [names for names in of.values() if names]
    else:
        room = 0
        for info in index.tensors.values():
            if not groups or info.nbytes > room:
                groups.append([])
                room = shard_bytes
            groups[-1].append(info.name)
            room -= info.nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{n:05d}-of-{len(groups):05d}.safetensors", names) for n, names in enumerate(groups, start=1)]


def refuse_unwritable(index: CheckpointIndex) -> None:
    """Raise CheckpointError for tensors of a type that cannot be written back."""
    for info in index.tensors.values():
        try:
            TensorSpec(info.name, info.dtype, info.shape)
        except ValueError as error:
            raise CheckpointError(f"{info.file}: {error}") from None
