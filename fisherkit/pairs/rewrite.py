"""Tensors of a pair computed and written, each as soon as it is done, with resume, in constant memory."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fisherkit.artefacts.sparse_delta import sidecar_of
from fisherkit.artefacts.sparse_writer import Entries, SparseWriter
from fisherkit.checkpoint.target import is_folder
from fisherkit.checkpoint.work_folder import Work
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.errors import CheckpointError, OptionError, ResumeError
from fisherkit.floats import Stored
from fisherkit.pairs.outputs import DELTA, FINISHED, Targets, check_targets, open_work, publish_all
from fisherkit.pairs.reader import Tensors
from fisherkit.pairs.shards import plan_shards
from fisherkit.progress import Track

TensorRow = dict[str, Any]
"""Figures that are reported of a tensor; plain values, since they go to JSON."""

_COMMIT_SECONDS = 5.0
_FLUSH_BYTES = 128 << 20  # that wait in memory at most before the disk is set to work


class Changed(NamedTuple):
    """One tensor as the output should have it.

    Attributes:
        data: [n] stored entries in the base's type.
        row: of the report.
        entries: what of it goes into the sparse delta; None for nothing, or where there is none.
    """

    data: Stored
    row: TensorRow
    entries: Entries | None = None


class Rewrite:
    """Outputs of a pair in the making; made by ``rewriting``. Call write_all, seal and publish, in this order.

    Attributes:
        rows: what is reported of the tensors that are done; at first, of those that a killed run has left.
    """

    def __init__(
        self,
        tensors: Tensors,
        targets: Targets,
        work: Work,
        writer: StreamedWriter | None,
        delta: SparseWriter | None,
        *,
        force: bool,
    ) -> None:
        self.rows: dict[str, TensorRow] = dict(work.progress.get("rows", {}))
        self._tensors = tensors
        self._targets = targets
        self._work = work
        self._writer = writer
        self._delta = delta
        self._force = force
        self._files: list[str] = work.progress.get("files", [])  # names of the checkpoint's, once it is complete
        self._committed = time.monotonic()
        self._lock = threading.Lock()  # around the rows, which several threads add to
        self._commits = threading.Lock()  # one after the other
        self._unflushed = 0
        self._flush: Future[None] | None = None  # the latest

    @property
    def folder(self) -> Path | None:
        """Folder that will be renamed, for what is to lie beside the weights; None if there is none, or no more."""
        return self._writer.staged if self._writer is not None and is_folder(self._targets.main) else None

    def write_all(
        self, names: Sequence[str], change: Callable[[str], Changed], track: Track, *, in_order: bool = False
    ) -> None:
        """Compute and write every tensor that is not done yet.

        Small tensors are taken side by side, by a thread each, which reads, computes and writes. Threads share a large
        one; and so they do with every tensor where the order counts. Small ones come first, so that their buffers are
        gone when large ones need theirs.

        Args:
            names: the tensors, in BASE's order.
            change: from a name to the tensor as it is to be written; called by several threads unless ``in_order``.
            track: progress in bytes.
            in_order: what becomes of a tensor depends on those before it, or one takes much more memory than it has.
        """
        stage = "writing" if self._writer is not None else "pruning"
        total = sum(self._tensors.info(name).nbytes for name in names)
        left = [name for name in names if name not in self.rows]
        done = total - sum(self._tensors.info(name).nbytes for name in left)
        is_small = {name: self._tensors.is_small(name) and not in_order and self._delta is None for name in left}
        small = [name for name in left if is_small[name]]
        large = [name for name in left if not is_small[name]]
        walk = self._tensors.walk([*small, *large])  # one, so that what the system reads ahead crosses over
        with ThreadPoolExecutor(1, thread_name_prefix="fisherkit-flush") as flusher:
            for take, part in ((self._side_by_side, small), (self._one_by_one, large)):
                for name in take(islice(walk, len(part)), change):
                    done += self._tensors.info(name).nbytes
                    self._flush_behind(flusher, name)
                    track(stage, done, total)
                self._tensors.release()
        self.rows = {name: self.rows[name] for name in names}
        track(stage, total, total)

    def _flush_behind(self, flusher: ThreadPoolExecutor, name: str) -> None:
        """Have what is written brought to the disk meanwhile, so that little of it is left for the end."""
        self._unflushed += self._tensors.info(name).nbytes
        if self._writer is not None and self._unflushed >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._wait_for_flush()
            self._unflushed = 0
            self._flush = flusher.submit(self._writer.sync)

    def _wait_for_flush(self) -> None:
        """Raise what went wrong in it: the system says so but once."""
        if self._flush is not None:
            self._flush.result()

    def _side_by_side(self, names: Iterable[str], change: Callable[[str], Changed]) -> Iterator[str]:
        """Compute and write tensors by a thread each; yield their names."""

        def one(name: str) -> str:
            self._store(name, change(name))
            return name

        yield from self._tensors.pool.side_by_side(one, names)

    def _one_by_one(self, names: Iterable[str], change: Callable[[str], Changed]) -> Iterator[str]:
        """Compute and write tensors by all threads together; yield their names."""
        for name in names:
            self._store(name, change(name))
            yield name

    def _store(self, name: str, changed: Changed) -> None:
        if (writer := self._writer) is not None:
            self._tensors.pool.transfer(changed.data, lambda part, start: writer.write_stored(name, part, start))
            writer.mark_written([name])
        if self._delta is not None and changed.entries is not None:
            self._delta.add(name, changed.entries)
        with self._lock:
            self.rows[name] = changed.row
            is_due = time.monotonic() - self._committed > _COMMIT_SECONDS
            if is_due:
                self._committed = time.monotonic()
        if is_due:
            self.commit()

    def commit(self) -> None:
        """Sync what is written, and then note that it is."""
        with self._commits:
            with self._lock:
                rows = dict(self.rows)  # what is added from now on may miss the sync
            if self._writer is not None:
                self._writer.sync()
            self._wait_for_flush()  # last: one that began meanwhile may have been told what this one was not
            state = {"delta": self._delta.sync()} if self._delta is not None else {}
            self._work.commit(rows=rows, **state)

    def seal(self, about: Mapping[str, Any]) -> tuple[Path, ...]:
        """Complete checkpoint and delta where they are made.

        Args:
            about: goes into the JSON beside the delta.

        Returns:
            The files that they will be.

        Raises:
            CheckpointError: nothing was kept for the delta.
            OutputError: the disk is full.
        """
        if FINISHED not in self._work.progress:
            self.commit()
            self._files = list(self._writer.seal()) if self._writer is not None else []
            if self._delta is not None and self._targets.delta is not None:
                self._delta.stage(self._work.folder / DELTA, self._targets.delta, about)
        out, delta = self._targets.checkpoint, self._targets.delta
        files = [] if out is None else [out / name if is_folder(out) else out for name in self._files]
        return (*files, *((delta, sidecar_of(delta)) if delta is not None else ()))

    def publish(self, beside: Mapping[Path, bytes]) -> None:
        """Rename everything into place.

        Args:
            beside: contents of the targets beside the checkpoint.

        Raises:
            OutputError: a target has appeared meanwhile, or the disk is full.
        """
        publish_all(self._targets, self._work, beside, self._files, force=self._force)


@contextmanager
def rewriting(
    tensors: Tensors,
    targets: Targets,
    names: Sequence[str],
    *,
    fingerprint: Mapping[str, str],
    shard_bytes: int | None,
    resume: bool,
    force: bool,
) -> Iterator[Rewrite]:
    """Lay out the outputs; nothing appears at its place before ``publish``.

    Args:
        tensors: both checkpoints.
        targets: what is to be made.
        names: the tensors that will be computed.
        fingerprint: what a run must have in common with one that it goes on with.
        shard_bytes: largest shard; None for the base's own division.
        resume: go on with what a killed run left.
        force: replace earlier outputs.

    Raises:
        OutputError: a target exists, the disk is full, or another run makes this output.
        ResumeError: the work folder belongs to another run.
    """
    force = check_targets(targets, fingerprint, force=force, resume=resume)
    with open_work(targets, fingerprint, force=force, resume=resume) as work:
        _refuse_damaged(work, names)
        rewrite: Rewrite | None = None
        try:
            with ExitStack() as stack:
                is_open = FINISHED not in work.progress  # else everything is finished, and only to be renamed
                shards = plan_shards(tensors.checkpoints.base.index, shard_bytes)
                writer = stack.enter_context(open_writer(tensors, targets, work, shards)) if is_open else None
                delta = stack.enter_context(_open_delta(targets, work)) if is_open else None
                rewrite = Rewrite(tensors, targets, work, writer, delta, force=force)
                yield rewrite
        except (CheckpointError, OptionError):
            done = len(rewrite.rows) if rewrite is not None else 0
            if done == len(names) or not work.progress.get("rows"):
                work.remove()  # the inputs were refused, and there is nothing to go on with
            raise
        work.remove()


def _refuse_damaged(work: Work, names: Sequence[str]) -> None:
    """Refuse a progress that speaks of other tensors, or calls finished what is not."""
    done, is_finished = work.progress.get("rows", {}).keys(), FINISHED in work.progress
    if not done <= set(names) or (is_finished and (len(done) < len(names) or "files" not in work.progress)):
        raise ResumeError(f"{work.folder}: its progress does not add up; delete it to start over")


@contextmanager
def open_writer(
    tensors: Tensors, targets: Targets, work: Work, shards: Sequence[tuple[str, Sequence[str]]]
) -> Iterator[StreamedWriter | None]:
    """Lay out files of the checkpoint in the work folder, or those that a killed run has laid out.

    Args:
        tensors: give types and shapes.
        targets: of the run; no writer where there is no checkpoint.
        work: the work folder.
        shards: names of the files, if they are to lie in a folder, and of the tensors in each.
    """
    out, rows = targets.checkpoint, work.progress.get("rows")
    if out is None:
        yield None
        return
    infos = [tensors.info(name) for _, names in shards for name in names]
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in infos]
    make = StreamedWriter.reopen if rows else StreamedWriter.create
    with make(out, specs, work=work.staging, shards=shards if is_folder(out) else None) as writer:
        writer.mark_written(rows or ())
        yield writer


@contextmanager
def _open_delta(targets: Targets, work: Work) -> Iterator[SparseWriter | None]:
    if targets.delta is None:
        yield None
        return
    with closing(SparseWriter(work.folder, work.progress.get("delta"))) as delta:
        yield delta
