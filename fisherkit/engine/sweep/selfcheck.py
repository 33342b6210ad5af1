"""Self-check before a long run: replaying blocks must give the Fisher that plain autograd gives.

One short sample goes both ways through the model cut down to its first group of blocks (the others pass their input
on), which needs no more weights than the run itself. What an architecture does in ways that the streaming engine does
not foresee shows here, before it costs hours.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisherkit.engine.fisher.squared_gradients import Capture, add_squared_parameters_, trainable
from fisherkit.engine.model.findings import NeedsBatchSizeOne, Unreplayable
from fisherkit.engine.model.linear_layers import BatchingCheck
from fisherkit.engine.sweep.blocks import Boundary, differentiate_blocks, run_blocks
from fisherkit.engine.sweep.causality import PROBE_TOKENS, check_causality, probe_inputs
from fisherkit.engine.sweep.feed import Inputs
from fisherkit.engine.sweep.job import Job
from fisherkit.engine.sweep.recorder import BlockCallRecorder
from fisherkit.errors import first_line
from fisherkit.kernels.loss import sample_loss

TOLERANCE = {torch.float32: 1e-3}  # rounding may differ between the two ways, the quantity may not
COARSE_TOLERANCE = 0.1
ROUNDING = 1e-10  # of squares: (1e-5)^2


def check_replay(job: Job, recorder: BlockCallRecorder, blocks: Sequence[int]) -> None:
    """Compare the targets of the first and the last of ``blocks``, which hold their weights.

    Raises:
        Unreplayable: the two ways differ, or these blocks cannot be run alone.
        NeedsBatchSizeOne: a linear layer's weight is used in another way than by calling the layer, or padding matters.
        AttendsAhead: later tokens matter.
    """
    ends = sorted({blocks[0], blocks[-1]})
    names = job.plan.names(ends) or [
        name for block in ends for name, p in job.skeleton.parameters(block).items() if p.ndim >= 2
    ]
    try:
        _compare(job, recorder, blocks, names)
        check_causality(job, lambda inputs: recorder.logits(inputs, real=blocks))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise Unreplayable(f"its blocks do not run alone ({type(error).__name__}: {first_line(error)})") from error


def _compare(job: Job, recorder: BlockCallRecorder, blocks: Sequence[int], names: Sequence[str]) -> None:
    inputs = _probe(job)
    ids = inputs["input_ids"]
    replayed, plain = job.accumulators(names), job.accumulators(names)
    _replay(job, recorder, blocks, inputs, replayed)
    with trainable(job.skeleton.model, names) as parameters, torch.enable_grad():
        _loss(job, recorder.logits(inputs, real=blocks), ids).backward()  # type: ignore[no-untyped-call]
        add_squared_parameters_(plain, parameters)
    tolerance = TOLERANCE.get(job.skeleton.dtype, COARSE_TOLERANCE)
    norms = {name: float(plain[name].norm()) for name in names}
    # A gradient that is zero but for rounding (a router that keeps one expert) is another one on every way.
    smallest = ROUNDING * max(norms.values())
    for name in names:
        difference = float((replayed[name] - plain[name]).norm())
        if not difference <= tolerance * max(norms[name], smallest):
            raise Unreplayable(f"a replayed sample gives {name} another Fisher than plain autograd")


def _replay(
    job: Job, recorder: BlockCallRecorder, blocks: Sequence[int], inputs: Inputs, sums: dict[str, Tensor]
) -> None:
    """Measure one sample the streamed way, with a boundary around every block."""
    skeleton, ids = job.skeleton, inputs["input_ids"]
    with torch.no_grad():
        record, first = recorder.record(inputs)
    if first.shape[:2] != ids.shape and any(len(batch) > 1 for batch in job.batches):
        raise NeedsBatchSizeOne(frozenset())  # hidden states have an axis before that of the samples (Gemma 3n)
    boundaries = [Boundary(first)]
    with torch.no_grad(), BatchingCheck(skeleton.model, sums, job.general) as batching:
        for block in blocks:
            boundaries.append(run_blocks(skeleton, [block], record, _copy(boundaries[-1])))
    batching.check(ids)
    final = boundaries.pop().hidden.requires_grad_()
    with torch.enable_grad():
        (hidden,) = torch.autograd.grad(_loss(job, recorder.logits(inputs, final=final), ids), final)
    gradient = Boundary(hidden)
    with Capture(skeleton.model, sums, job.general) as capture:
        for block, entering in zip(reversed(blocks), reversed(boundaries), strict=True):
            capture.begin([ids.shape[1]])
            gradient = differentiate_blocks(skeleton, [block], record, _copy(entering), _always(gradient))
            capture.finish()


def _probe(job: Job) -> Inputs:
    shortest = min(job.samples, key=lambda sample: len(sample.ids))
    return probe_inputs(job, list(shortest.ids[:PROBE_TOKENS]))


def _loss(job: Job, logits: Tensor, ids: Tensor) -> Tensor:
    return sample_loss(logits[0], ids[0], torch.ones_like(ids[0], dtype=torch.bool), job.reduction)


def _always(gradient: Boundary) -> Callable[[Boundary], Boundary]:
    return lambda leaving: gradient


def _copy(boundary: Boundary) -> Boundary:
    side = {key: tuple(tensor.detach().clone() for tensor in value) for key, value in boundary.side.items()}
    return Boundary(boundary.hidden.detach().clone(), side)
