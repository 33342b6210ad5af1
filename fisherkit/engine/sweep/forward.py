"""Forward sweeps of several models, group by group and side by side: what their tokens are predicted from, and losses.

A *visit* is one group of blocks of one model: load its weights, push every batch through, keep the hidden states at
its border, drop the weights. Visits go group by group, and within a group model by model, so that models which are
made of the same tensors (a base, pruned at several densities) have their group at the same time. The next visit's
weights are read while one computes. What lies around the blocks (embedding, head) is loaded for the first visit and
for the losses, and is not there in between. So memory holds the weights of two groups, however many models there are.

Cost: one forward of each model; its blocks are read once, what lies around them twice.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from fisherkit.checkpoint.work_folder import Work
from fisherkit.engine.model.findings import AttendsAhead, FoundInModel, NeedsBatchSizeOne, Unreplayable
from fisherkit.engine.sweep.spool import Budget
from fisherkit.engine.sweep.token_figures import TokenFigures, token_figures
from fisherkit.engine.sweep.walks import ForwardJob, ResidentWalk, StreamedWalk, Walk
from fisherkit.progress import Track


class ForwardSweep:
    """Visits of all models; a context. The work folder notes under ``visits`` how many are finished.

    Args:
        jobs: the models; the first is the one that others are compared with.
        work: folder for hidden states.
        budget: memory that they may take before they are read back from disk.
        track: progress, called with stage, done and total.
    """

    def __init__(self, jobs: Sequence[ForwardJob], work: Work, budget: Budget, track: Track) -> None:
        self._work, self._track = work, track
        drop_outer = len(jobs) > 1
        self._walks: list[Walk] = [
            ResidentWalk(job, number, work.folder, budget)
            if job.resident
            else StreamedWalk(job, number, work.folder, budget, drop_outer=drop_outer)
            for number, job in enumerate(jobs)
        ]
        longest = max(walk.visits for walk in self._walks)
        self._visits = [(at, n) for at in range(longest) for n, walk in enumerate(self._walks) if at < walk.visits]
        self._tokens = [[(sample.ids, sample.counts) for sample in job.feed.samples] for job in jobs]
        self._batches = [len(job.feed.samples if job.resident else job.feed.batches) for job in jobs]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for walk in self._walks:
            walk.close()

    def run(self) -> None:
        """Make all visits that the work folder does not know of yet.

        Raises:
            FoundInModel: a model cannot be run in this way.
            CheckpointError: damaged or missing weights.
            UnsupportedModelError: a resident model does not run on token ids alone.
        """
        for place in range(self._work.progress.get("visits", 0), len(self._visits)):
            at, number = self._visits[place]
            then = self._visits[place + 1] if place + 1 < len(self._visits) else None
            try:
                self._visit(place, at, number, then)
            except (Unreplayable, NeedsBatchSizeOne, AttendsAhead) as finding:
                raise FoundInModel(number, finding) from finding
            self._work.commit(visits=place + 1)
            self._walks[number].drop(at)

    def figures(self, number: int) -> TokenFigures:
        """Return losses of one model's tokens, and how far its predictions are from the first model's.

        Where the two were given other tokens there is no comparison, also not of answers that are the same letter.
        """
        first, own = self._walks[0].rows, self._walks[number].rows
        self._walks[0].load_outer()
        self._walks[number].load_outer()
        compared = first if number and self._tokens[0] == self._tokens[number] else None
        stage = f"scoring: losses, model {number + 1} of {len(self._walks)}"
        figures = token_figures(own, compared, lambda done, total: self._track(stage, done, total))
        if number:
            self._walks[number].drop_outer()
        return figures

    def _visit(self, place: int, at: int, number: int, then: tuple[int, int] | None) -> None:
        walk, total = self._walks[number], sum(self._batches[n] for _, n in self._visits)
        before = sum(self._batches[n] for _, n in self._visits[:place])
        stage = f"scoring: model {number + 1} of {len(self._walks)}, group {at + 1} of {walk.visits}"
        walk.load(at)
        if then is not None:
            self._walks[then[1]].read_ahead(then[0])
        walk.visit(at, lambda done: self._track(stage, before + done, total))
