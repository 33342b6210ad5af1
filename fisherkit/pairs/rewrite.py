"""A checkpoint like BASE, written tensor by tensor, in constant memory, with resume; it appears when it is whole."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
"""Figures that are reported of a tensor; plain values, since they go to JSON."""

_COMMIT_SECONDS = 5.0
_WRITE_BYTES = 8 << 20  # per call of the system


def work_folder(out: Path) -> Path:
    """Return the folder in which an output is made."""
    return out.parent / f"{out.name}.partial"


def may_replace(out: Path, *, force: bool, resume: bool) -> bool:
    """Return whether an earlier output of fisherkit's may be replaced.

    By --force; and where a run is resumed that was given it, or that was killed when all but the tidying was done.
    """
    return force or (resume and is_folder(out) and work_folder(out).is_dir())


def check_output(out: Path, pair: Pair, *, force: bool, resume: bool = False) -> None:
    """Refuse an output that is one of the inputs, lies in one, or holds one; and what check_target refuses.

    Args:
        out: the target.
        pair: the inputs.
        force: an earlier output of fisherkit's may be replaced.
        resume: a killed run is gone on with.

    Raises:
        OutputError: see above.
    """
    target = out.resolve()
    for role, source in (("BASE", pair.base_source), ("FT", pair.tuned_source)):
        path = source.path.resolve()
        if target == path or target in path.parents or path in target.parents:
            raise OutputError(f"{out}: is {role} itself, or one lies inside of the other; choose another output")
        if work_folder(out).resolve() in path.parents:
            raise OutputError(f"{out}: {role} lies in {work_folder(out)}, where the output is made; move it away first")
    if re.fullmatch(r"\.[a-z]+", out.suffix.lower()) and out.suffix.lower() != ".safetensors":
        raise OutputError(f"{out}: models are written as safetensors; give a folder's name, or one in .safetensors")
    check_target(out, force=may_replace(out, force=force, resume=resume))


class Rewrite:
    """A checkpoint like BASE in the making; made by ``rewriting``.

    Attributes:
        rows: what is reported of the tensors that are written; at first, of those that a killed run has left.
    """

    def __init__(self, tensors: Tensors, writer: StreamedWriter, work: Work, *, is_folder: bool, force: bool) -> None:
        self.rows: dict[str, Row] = dict(work.progress.get("rows", {}))
        self._tensors = tensors
        self._writer = writer
        self._work = work
        self._is_folder = is_folder
        self._force = force
        self._committed = time.monotonic()

    @property
    def folder(self) -> Path | None:
        """Folder that will be renamed, for what is to lie beside the weights; None for a single file."""
        return self._writer.staged if self._is_folder else None

    def write_all(self, change: Callable[[str], tuple[Stored, Row]], track: Track) -> None:
        """Write every tensor that is not written yet.

        One is written, and from time to time synced, while the next one is computed.

        Args:
            change: from a name to the flat tensor to write, in the base's type, and its row of the report.
            track: progress in bytes.
        """
        names = list(self._tensors.checkpoints.base.index.tensors)
        total = sum(self._tensors.info(name).nbytes for name in names)
        done = sum(self._tensors.info(name).nbytes for name in self.rows)
        with ThreadPoolExecutor(1, thread_name_prefix="fisherkit-write") as behind:
            writing: Future[None] | None = None
            for name in self._tensors.walk([name for name in names if name not in self.rows]):
                track("writing", done, total)
                data, row = change(name)
                if writing is not None:
                    writing.result()
                writing = behind.submit(self._write, name, data, row)
                if not self._tensors.double_buffer(data):  # the next tensor is read over this one
                    writing.result()
                done += data.nbytes
            if writing is not None:
                writing.result()
        track("writing", total, total)

    def _write(self, name: str, data: Stored, row: Row) -> None:
        step = max(1, _WRITE_BYTES // data.itemsize)
        for start in range(0, data.size, step):
            self._writer.write_stored(name, data[start : start + step], start)
        self._writer.mark_written([name])
        self.rows[name] = row
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self._writer.sync()  # before the progress says so
            self._work.commit(rows=self.rows)
            self._committed = time.monotonic()

    def publish(self) -> tuple[Path, ...]:
        """Rename the output into place; returns its files.

        Raises:
            OutputError: the target exists, or the disk is full.
        """
        return self._writer.finish(force=self._force)


@contextmanager
def rewriting(
    tensors: Tensors,
    out: Path,
    *,
    fingerprint: Mapping[str, str],
    shard_bytes: int | None,
    resume: bool,
    force: bool,
) -> Iterator[Rewrite]:
    """Lay out ``out`` with BASE's tensors; nothing appears there before ``publish``.

    Args:
        tensors: both checkpoints.
        out: the folder (or `.safetensors` file) to make.
        fingerprint: what a run must have in common with one that it goes on with.
        shard_bytes: largest shard; None for the base's own division.
        resume: go on with what a killed run left.
        force: replace an earlier output.

    Raises:
        OutputError: the target exists or the disk is full.
        ResumeError: the work folder belongs to another run.
    """
    index = tensors.checkpoints.base.index
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in index.tensors.values()]
    shards = plan_shards(index, shard_bytes) if is_folder(out) else None
    force = may_replace(out, force=force, resume=resume)
    with _open_work(out, fingerprint, resume) as work:
        make = StreamedWriter.reopen if work.progress.get("rows") else StreamedWriter.create
        rewrite: Rewrite | None = None
        try:
            with make(out, specs, work=work.folder, shards=shards) as writer:
                rewrite = Rewrite(tensors, writer, work, is_folder=is_folder(out), force=force)
                writer.mark_written(rewrite.rows)
                yield rewrite
        except (CheckpointError, OptionError):
            written = len(rewrite.rows) if rewrite is not None else 0
            if written == len(specs) or not work.progress.get("rows"):
                work.remove()  # the inputs were refused, and there is nothing to go on with
            raise
        work.remove()


def _open_work(out: Path, fingerprint: Mapping[str, str], resume: bool) -> Work:
    folder = work_folder(out)
    if resume and (folder / out.name).exists():  # else it was killed before anything, or after everything
        found = Work.resume(folder, dict(fingerprint))
        if found is not None:
            return found
    return Work.start(folder, dict(fingerprint))


def plan_shards(index: CheckpointIndex, shard_bytes: int | None) -> list[tuple[str, Sequence[str]]]:
    """Divide an output into files: as the base is divided, under transformers' names, or by size.

    Args:
        index: BASE.
        shard_bytes: largest file, unless a single tensor is larger; None for the base's own division.

    Returns:
        File names, and the names of the tensors in each.
    """
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
