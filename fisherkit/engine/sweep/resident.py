"""Resident engine, the published recipe: the whole model resident, the parameters of one group unfrozen at a time.

Samples go through it one by one. It is the oracle of the streaming engine, the baseline of the benchmarks, and the
fallback for models whose blocks cannot be replayed one by one.
"""

import torch

from fisherkit.engine.fisher.squared_gradients import add_squared_parameters_, trainable
from fisherkit.engine.model.weights import Weights
from fisherkit.engine.sweep.causality import check_causality
from fisherkit.engine.sweep.feed import Feed
from fisherkit.engine.sweep.job import Job
from fisherkit.engine.sweep.losses import Losses
from fisherkit.errors import UnsupportedModelError, first_line


def resident(job: Job) -> None:
    """Measure every target of the plan; values go to ``job.sink``, progress to ``job.work``.

    Raises:
        CheckpointError: damaged or missing weights.
        UnsupportedModelError: the model does not run on token ids alone.
        AttendsAhead: tokens see later ones.
        FisherkitError: a loss that is not finite.
    """
    with (
        job.open_source() as source,
        Weights(job.skeleton, source, job.device, keep=True) as weights,
        job.ranks.guarding(),
    ):
        weights.load_all()
        with job.ranks.agreeing():
            check_runs(job)
        groups: list[tuple[int | None, ...]] = [group for group in job.plan.groups if job.plan.names(group)]
        groups += [(None,)] if job.plan.names([None]) else []
        if job.covariances is not None and not job.covariances.is_laid_out:
            probe_shared_inputs(job)
        for number in range(job.work.progress.get("resident", 0), len(groups)):
            _measure(job, groups[number], number, len(groups))


def check_runs(feed: Feed) -> None:
    """Run a few tokens, to see that the model takes nothing else and that no token sees the ones after it.

    Raises:
        UnsupportedModelError: it does not run on token ids alone.
        AttendsAhead: tokens see later ones.
    """
    try:
        check_causality(feed, lambda inputs: feed.skeleton.model(**inputs, use_cache=False).logits)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(feed.skeleton.model).__name__} does not run on token ids alone "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


@torch.no_grad()
def probe_shared_inputs(job: Job) -> None:
    """Find the layers that share their inputs, by one sample where that is not known; then lay out the covariances."""
    assert job.covariances is not None
    if not job.covariances.knows_shared_inputs:
        with job.covariances.probing(range(len(job.skeleton.blocks))):
            job.skeleton.model(**job.inputs([0]), use_cache=False)
    job.covariances.lay_out()
    job.work.commit(moments=job.covariances.state())


def _measure(job: Job, group: tuple[int | None, ...], number: int, count: int) -> None:
    sums = job.accumulators(job.plan.names(group))
    losses = Losses(job)
    with trainable(job.skeleton.model, sums) as parameters, job.gathering(group) as gather:
        for step, (sample,) in enumerate(job.batches, start=1):
            if gather is not None:
                gather.begin(job.lengths([sample]))
            with torch.enable_grad():
                logits = job.skeleton.model(**job.inputs([sample]), use_cache=False).logits[0]
                loss = job.loss(sample, logits)
            if not loss.requires_grad:
                raise UnsupportedModelError(
                    f"{type(job.skeleton.model).__name__}: autograd finds no way from the loss to {next(iter(sums))}; "
                    "it differentiates its blocks by itself, and only with all of its weights at once"
                )
            losses.add(sample, loss)
            loss.backward()  # type: ignore[no-untyped-call]
            add_squared_parameters_(sums, parameters)
            if gather is not None:
                gather.finish()
            job.track("resident", number * len(job.batches) + step, count * len(job.batches))
    mean = losses.mean()
    job.deliver(group, sums, gather)
    job.sync()
    job.note(resident=number + 1, loss=mean, **job.state())
