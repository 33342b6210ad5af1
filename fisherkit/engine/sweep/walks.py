"""Walks of models through their blocks: group by group, or at once where blocks cannot be replayed.

Who comes next, and what the rows of a walk are good for, is engine.sweep.forward's business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fisherkit.checkpoint.tensor_source import TensorSource
from fisherkit.engine.model.weights import Weights
from fisherkit.engine.sweep.block_arguments import Arguments
from fisherkit.engine.sweep.blocks import Boundary, run_blocks
from fisherkit.engine.sweep.feed import Feed
from fisherkit.engine.sweep.forward_check import check_forward
from fisherkit.engine.sweep.last_rows import LastRows
from fisherkit.engine.sweep.recorder import BlockCallRecorder
from fisherkit.engine.sweep.resident import check_runs
from fisherkit.engine.sweep.spool import Budget, Spool

Done = Callable[[int], None]
"""Progress of a visit: called with how many batches it has finished."""


@dataclass(frozen=True, kw_only=True)
class ForwardJob:
    """One model and how it is run.

    Attributes:
        feed: the model and its samples.
        source: gives its weights.
        groups: block numbers, consecutive.
        resident: run with all weights in memory, since its blocks cannot be replayed.
    """

    feed: Feed
    source: TensorSource
    groups: tuple[tuple[int, ...], ...]
    resident: bool = False


class Walk(Protocol):
    """One model on its way through its groups.

    Attributes:
        visits: how many there are; ``rows`` are whole after the last one.
    """

    visits: int

    @property
    def rows(self) -> LastRows:
        """What its tokens are predicted from; of an earlier process where this one has made no visit."""
        ...

    def load(self, at: int) -> None:
        """Load the weights for a visit."""

    def read_ahead(self, at: int) -> None:
        """Start to read the weights for a visit."""

    def visit(self, at: int, track: Done) -> None:
        """Push every batch through a group, then drop its weights."""

    def drop(self, at: int) -> None:
        """Drop what entered a group; the work folder knows of what left it."""

    def load_outer(self) -> None:
        """Load what makes logits of the rows."""

    def drop_outer(self) -> None:
        """Drop it again."""

    def close(self) -> None:
        """Give threads, memory and files back."""


class StreamedWalk:
    """A model whose blocks come and go, group by group."""

    def __init__(self, job: ForwardJob, number: int, folder: Path, budget: Budget, *, drop_outer: bool) -> None:
        self.visits = len(job.groups)
        self._job, self._number, self._folder, self._budget = job, number, folder, budget
        self._drops_outer, self._has_outer = drop_outer, False
        self._weights = Weights(job.feed.skeleton, job.source, job.feed.device)
        self._recorder = BlockCallRecorder(job.feed.skeleton)
        self._arguments: Arguments | None = None
        self._rows: LastRows | None = None
        self._entering: Spool | None = None
        self._spent: Spool | None = None
        self._spools: list[Spool] = []

    @property
    def rows(self) -> LastRows:
        """Rows of an earlier process where this one has made no visit."""
        if self._rows is None:
            self._rows = LastRows(self._job.feed, self._recorder, Spool.reopen(self._path("rows"), self._budget))
        return self._rows

    def load(self, at: int) -> None:
        """Load the weights for a visit; the first one of a process also looks if the model can be run so."""
        if self._arguments is None:
            self._record(fresh=at == 0)
        self._weights.enter(self._job.groups[at])
        if at == 0:
            check_forward(self._job.feed, self._recorder, self._job.groups[0])
        if self._drops_outer and self._has_outer:
            self.drop_outer()

    def read_ahead(self, at: int) -> None:
        """Start to read the weights for a visit."""
        self._weights.read_ahead(self._job.groups[at])

    @torch.no_grad()
    def visit(self, at: int, track: Done) -> None:
        """Push every batch through a group, then drop its weights."""
        job, group = self._job, self._job.groups[at]
        assert self._arguments is not None
        if self._entering is None:
            self._entering = Spool.reopen(self._path("boundary", at), self._budget)
        leaving = self._leaving(at)
        for batch, members in enumerate(job.feed.batches):
            entering = Boundary.unpack(*self._entering.get(str(batch), job.feed.device))
            boundary = run_blocks(job.feed.skeleton, group, self._arguments.get(batch, group), entering)
            if leaving is None:
                self.rows.keep(members, boundary.hidden)
            else:
                leaving.put(str(batch), *boundary.pack())
            track(batch + 1)
        self._weights.leave(group)
        (leaving or self.rows).finish()
        self._spent, self._entering = self._entering, leaving

    def drop(self, at: int) -> None:
        """Drop what entered a group; the work folder knows of what left it."""
        if self._spent is not None:
            self._spent.remove()
        if at == self.visits - 1 and self._arguments is not None:
            self._arguments.close()

    def load_outer(self) -> None:
        """Load what makes logits of the rows."""
        if not self._has_outer:
            self._weights.load_outer()
            self._has_outer = True
        if self._arguments is None:  # in a run that goes on: the recorder learns from it how blocks are called
            with torch.no_grad():
                self._recorder.record(self._job.feed.inputs(self._job.feed.batches[0]))

    def drop_outer(self) -> None:
        """Drop it again."""
        self._weights.leave_outer()
        self._has_outer = False

    def close(self) -> None:
        """Give threads, memory and files back."""
        self._weights.__exit__(None, None, None)
        if self._arguments is not None:
            self._arguments.close()
        for spool in self._spools:
            spool.close()

    def _record(self, *, fresh: bool) -> None:
        """Record the arguments of all blocks; at the beginning also what enters the first one."""
        self._weights.load_outer()
        self._has_outer = True
        self._arguments = Arguments(self._job.feed, self._recorder, self._spool("arguments"))
        entering = self._spool("boundary", 0) if fresh else None
        for batch in range(len(self._job.feed.batches)):
            first = self._arguments.record(batch)
            if entering is not None:
                entering.put(str(batch), *Boundary(first).pack())
        if fresh:
            self._entering = entering

    def _leaving(self, at: int) -> Spool | None:
        """Return a fresh spool for what leaves a group; None after the last one, which makes rows."""
        if at < self.visits - 1:
            return self._spool("boundary", at + 1)
        self._rows = LastRows(self._job.feed, self._recorder, self._spool("rows"))
        return None

    def _spool(self, kind: str, at: int | None = None) -> Spool:
        self._spools.append(Spool(self._path(kind, at), self._budget))
        return self._spools[-1]

    def _path(self, kind: str, at: int | None = None) -> Path:
        return self._folder / f"{kind}-{self._number}{'' if at is None else f'-{at}'}.bin"


class ResidentWalk:
    """A model that is loaded as a whole, once; the logits of its tokens are its rows."""

    visits = 1

    def __init__(self, job: ForwardJob, number: int, folder: Path, budget: Budget) -> None:
        self._job, self._path, self._budget = job, folder / f"rows-{number}.bin", budget
        self._weights = Weights(job.feed.skeleton, job.source, job.feed.device, keep=True)
        self._rows: LastRows | None = None

    @property
    def rows(self) -> LastRows:
        """Rows of an earlier process where this one has made no visit."""
        if self._rows is None:
            self._rows = LastRows(self._job.feed, None, Spool.reopen(self._path, self._budget))
        return self._rows

    def load(self, at: int) -> None:
        """Load the weights for a visit; the first one of a process also looks if the model can be run so."""
        self._weights.load_all()
        check_runs(self._job.feed)

    def read_ahead(self, at: int) -> None:
        """Read when it is loaded: the whole of it would stand beside another model's group."""

    @torch.no_grad()
    def visit(self, at: int, track: Done) -> None:
        """Run every sample, then drop all weights."""
        feed = self._job.feed
        self._rows = LastRows(feed, None, Spool(self._path, self._budget))
        for number in range(len(feed.samples)):
            self._rows.keep_logits(number, feed.skeleton.model(**feed.inputs([number]), use_cache=False).logits[0])
            track(number + 1)
        self._rows.finish()
        self._weights.leave_all()

    def drop(self, at: int) -> None:
        """There is nothing that entered."""

    def load_outer(self) -> None:
        """The rows are logits already."""

    def drop_outer(self) -> None:
        """There is none."""

    def close(self) -> None:
        """Give threads, memory and files back."""
        self._weights.__exit__(None, None, None)
        if self._rows is not None:
            self._rows.close()
