"""Covariances of the inputs of linear layers by one forward sweep: no loss, no gradients, no head.

The blocks above the last target are never loaded. Cost F and one read of the weights, where which layers share their
inputs shows without weights (on the meta device); otherwise one batch runs through all groups first.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from fisherkit.engine.covariance.writer import CovarianceWriter
from fisherkit.engine.model.linear_layers import BatchingCheck
from fisherkit.engine.model.weights import Weights
from fisherkit.engine.sweep.blocks import Boundary, run_blocks
from fisherkit.engine.sweep.job import Job
from fisherkit.engine.sweep.resident import check_runs, probe_shared_inputs
from fisherkit.engine.sweep.selfcheck import check_replay
from fisherkit.engine.sweep.sweep import Sweep


def stream_inputs(job: Job) -> None:
    """Gather the covariances of the plan's targets group by group; they go to ``job.covariances``.

    Raises:
        Unreplayable: the blocks of this model cannot be run one by one.
        NeedsBatchSizeOne: batches must hold one sample each.
        CheckpointError: damaged or missing weights.
        FisherkitError: values that overflow.
    """
    with (
        job.open_source() as source,
        Weights(job.skeleton, source, job.device, keep=job.keep_weights) as weights,
    ):
        weights.load_outer()
        with _InputSweep(job, weights) as sweep, job.ranks.guarding(), sweep.settling():
            sweep.run()


@torch.no_grad()
def resident_inputs(job: Job) -> None:
    """Gather the same with the whole model in memory, for models whose blocks cannot be run one by one.

    Raises:
        CheckpointError: damaged or missing weights.
        UnsupportedModelError: the model does not run on token ids alone.
    """
    covariances = _covariances_of(job)
    with (
        job.open_source() as source,
        Weights(job.skeleton, source, job.device, keep=True) as weights,
        job.ranks.guarding(),
    ):
        weights.load_all()
        with job.ranks.agreeing():
            check_runs(job)
        if not covariances.is_laid_out:
            probe_shared_inputs(job)
        groups = [group for group in job.plan.groups if job.plan.names(group)]
        for number in range(job.work.progress.get("resident", 0), len(groups)):
            with covariances.gather(groups[number]) as gather:
                for step, (sample,) in enumerate(job.batches, start=1):
                    gather.begin(job.lengths([sample]))
                    job.skeleton.model(**job.inputs([sample]), use_cache=False)
                    gather.finish()
                    job.track("resident", number * len(job.batches) + step, len(groups) * len(job.batches))
            covariances.keep(gather)
            job.sync()
            job.note(resident=number + 1, **job.state())


class _InputSweep(Sweep):
    """The forward sweep, with covariances gathered on the way."""

    def run(self) -> None:
        progress = self.job.work.progress
        top = max(number for number, group in enumerate(self.groups) if self.job.plan.names(group))
        if "forward" not in progress:
            self.weights.enter(self.groups[0])
            with self.job.ranks.agreeing():
                check_replay(self.job, self.recorder, self.groups[0])
        self._record()
        self._lay_out(top)
        for number in range(progress["forward"], top + 1):
            self._gather(number, top)
        self._wait_for_commit()

    @torch.no_grad()
    def _lay_out(self, top: int) -> None:
        """Find which layers share their inputs, and make room for all covariances."""
        covariances = _covariances_of(self.job)
        if covariances.is_laid_out:
            return
        if not covariances.knows_shared_inputs:
            boundary = self._load("boundary-0", 0) if self.job.batches else None
            for group in self.groups[: top + 1]:
                self.weights.enter(group)
                with self.job.ranks.agreeing(), covariances.probing(group):
                    if boundary is not None:
                        record = self.arguments.get(0, group)
                        boundary = run_blocks(self.job.skeleton, group, record, boundary)
                self.weights.leave(group)
        covariances.lay_out()
        self._wait_for_commit()
        self.job.work.commit(**self.job.state())

    @torch.no_grad()
    def _gather(self, number: int, top: int) -> None:
        """Push every batch through a group, and keep the group's covariances."""
        job, group, covariances = self.job, self.groups[number], _covariances_of(self.job)
        self.weights.enter(group, self._next(number + 1) if number < top else ())
        leaving = self._spool(f"boundary-{number + 1}", fresh=True) if number < top else None
        with covariances.gather(group) as gather, job.ranks.agreeing():
            for batch, members in enumerate(job.batches):
                gather.begin(job.lengths(members))
                left = self._push_once(number, batch)
                if leaving is not None:
                    leaving.put(str(batch), *left.pack())
                gather.finish()
                job.track("inputs", number * len(job.batches) + batch + 1, (top + 1) * len(job.batches))
        self.weights.leave(group)
        covariances.keep(gather)
        whole = [f"boundary-{number + 1}"] if leaving is not None else []
        self._commit(whole, [f"boundary-{number}"], forward=number + 1)

    def _push_once(self, number: int, batch: int) -> Boundary:
        """Push a batch through a group; the first one also shows if batches suit it."""
        job, group = self.job, self.groups[number]
        record, entering = self.arguments.get(batch, group), self._load(f"boundary-{number}", batch)
        checking: AbstractContextManager[BatchingCheck | None] = nullcontext()
        if batch == 0:
            checking = BatchingCheck(job.skeleton.model, job.plan.names(group), job.general)
        with checking as batching:
            leaving = run_blocks(job.skeleton, group, record, entering)
        if batching is not None:
            batching.check(job.ids(job.batches[batch]))
        return leaving


def _covariances_of(job: Job) -> CovarianceWriter:
    assert job.covariances is not None, "there is nothing else to gather"
    return job.covariances
