"""Self-check before a long run: replaying blocks must give the Fisher that plain autograd gives.

One short sample goes both ways through the model cut down to its first group of blocks (the others pass their input
on), which needs no more weights than the run itself. What an architecture does in ways that the streaming engine does
not foresee shows here, before it costs hours.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisherkit.engine.fisher.squared_gradients import Capture, trainable
from fisherkit.engine.model.findings import NeedsBatchSizeOne, Unreplayable
from fisherkit.engine.model.linear_layers import BatchingCheck
from fisherkit.engine.sweep.blocks import Boundary, differentiate_blocks, run_blocks
from fisherkit.engine.sweep.causality import PROBE_TOKENS, check_causality, probe_inputs
from fisherkit.engine.sweep.feed import Inputs
from fisherkit.engine.sweep.job import Job
from fisherkit.engine.sweep.recorder import BlockCallRecorder
from fisherkit.errors import first_line
from fisherkit.kernels.fisher import subtract_squares_
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
        _compare(job, recorder, blocks, _parts(job, names))
        check_causality(job, lambda inputs: recorder.logits(inputs, real=blocks))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise Unreplayable(f"its blocks do not run alone ({type(error).__name__}: {first_line(error)})") from error


def _parts(job: Job, names: Sequence[str]) -> list[list[str]]:
    """Divide the parameters so that a part takes no more memory than the run itself, as far as that can be.

    Plain autograd makes whole gradients of all of them, for which the run has no need.
    """
    gradient = torch.empty((), dtype=job.skeleton.dtype).element_size()
    replays = [part for group in job.plan.groups for part in job.replays(group)]
    run = max(_numel(job, part) for part in replays)
    most, parts, room = 4 * run // (4 + gradient), list[list[str]](), 0
    for name in names:
        size = _numel(job, [name])
        if not parts or size > room:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= size
    return parts


def _numel(job: Job, names: Sequence[str]) -> int:
    return sum(job.skeleton.model.get_parameter(name).numel() for name in names)


def _compare(job: Job, recorder: BlockCallRecorder, blocks: Sequence[int], parts: Sequence[Sequence[str]]) -> None:
    """Compare the parameters, part by part; all of them before one is refused."""
    inputs = _probe(job)
    norms, differences = dict[str, float](), dict[str, float]()
    for names in parts:
        replayed = job.accumulators(names)
        _replay(job, recorder, blocks, inputs, replayed)
        with trainable(job.skeleton.model, names) as parameters:
            with torch.enable_grad():
                loss = _loss(job, recorder.logits(inputs, real=blocks), inputs["input_ids"])
                if loss.requires_grad:  # not where no weight of this part is used (layers that look at pictures)
                    loss.backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                norms[name], differences[name] = subtract_squares_(replayed[name], parameter.grad)
                parameter.grad = None
    tolerance = TOLERANCE.get(job.skeleton.dtype, COARSE_TOLERANCE)
    # A gradient that is zero but for rounding (a router that keeps one expert) is another one on every way.
    smallest = ROUNDING * max(norms.values())
    for name, difference in differences.items():
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
    return sample_loss(logits[0], ids[0], torch.arange(1, ids.shape[1], device=ids.device), job.reduction)


def _always(gradient: Boundary) -> Callable[[Boundary], Boundary]:
    return lambda leaving: gradient


def _copy(boundary: Boundary) -> Boundary:
    side = {key: tuple(tensor.detach().clone() for tensor in value) for key, value in boundary.side.items()}
    return Boundary(boundary.hidden.detach().clone(), side)
