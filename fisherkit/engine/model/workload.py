"""Work of a streamed run: floating-point operations of its matrix products, bytes read and bytes written.

A product of a weight with one token takes two operations per entry. Over the whole run a block takes one forward in
the forward sweep (the last group none), and per replay in the backward sweep one forward and as much again for the
gradients of its inputs; a target's squared gradients take as much as its forward. See engine.sweep.sweep.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn

from fisherkit.engine.model.needs import Estimate, Load, experts_seen
from fisherkit.engine.model.plan import Plan, replays_of
from fisherkit.engine.model.skeleton import Skeleton

_LEAST_PROBE, _PROBE = 128, 2048  # rows and columns of the matrices that a machine's rate is measured with
_REPEATS = 3
_PATIENCE = 0.5  # seconds that one product may take


@dataclass(frozen=True)
class Workload:
    """Work of a run.

    Attributes:
        flops: floating-point operations in matrix products.
        bytes_read: of weights, and of hidden states that are read back.
        bytes_written: of the output, and of hidden states.
    """

    flops: int
    bytes_read: int
    bytes_written: int


def workload(skeleton: Skeleton, plan: Plan, estimate: Estimate, *, output_bytes: int, spool_bytes: int) -> Workload:
    """Return the work of a run.

    Args:
        skeleton: the model.
        plan: of the run.
        estimate: of the model's memory, for what is pushed through it.
        output_bytes: of all that the run makes.
        spool_bytes: of hidden states that are kept in memory.
    """
    load, groups, last = estimate.load, plan.groups, len(plan.groups) - 1
    outer = bool(plan.names([None]))
    measured = [number for number, group in enumerate(groups) if plan.names(group)]
    lowest = 0 if outer or not measured else measured[0]
    if load.inputs_only:
        return _forward_alone(skeleton, plan, estimate, output_bytes)
    head = _head(skeleton)
    per_token, read = 2 * head, estimate.stored_bytes([None])
    for number, group in enumerate(groups):
        forward, targets = sum(_products(skeleton, block, load) for block in group), _targets(skeleton, plan, group)
        replays = len(replays_of(skeleton, plan, group, covariances=bool(load.covariances)))
        sweeps = (number < last) + (number >= lowest)
        per_token += forward * (number < last) + (number >= lowest) * (2 * replays * forward + targets)
        read += sweeps * estimate.stored_bytes(group)
    per_token += 3 * head if outer else 0
    spooled = estimate.boundary_bytes(plan)
    return Workload(2 * load.tokens * per_token, read + max(0, spooled - spool_bytes), output_bytes + spooled)


def _forward_alone(skeleton: Skeleton, plan: Plan, estimate: Estimate, output_bytes: int) -> Workload:
    """Return the work of one forward up to the last target, on which covariances are gathered."""
    load, highest = estimate.load, max(block for block in plan.targets if block is not None)
    groups = [group for group in plan.groups if group[0] <= highest]
    flops = 2 * load.tokens * sum(_products(skeleton, block, load) for group in groups for block in group)
    read = estimate.stored_bytes([None]) + sum(estimate.stored_bytes(group) for group in groups)
    return Workload(flops, read, output_bytes + estimate.boundary_bytes(plan))


def machine_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of this machine's CPU on large matrices of a dtype: the best of a few.

    On matrices as large as it multiplies in a moment: bfloat16 can be a hundred times slower than float32.
    """
    size = _LEAST_PROBE
    seconds = _product_seconds(size, dtype, repeats=1)
    while size < _PROBE and 8 * seconds < _PATIENCE:
        size *= 2
        seconds = _product_seconds(size, dtype, repeats=1)
    return 2 * size**3 / min(seconds, _product_seconds(size, dtype, repeats=_REPEATS - 1))


def _product_seconds(size: int, dtype: torch.dtype, *, repeats: int) -> float:
    one, other = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(one, other)
        times.append(time.perf_counter() - start)
    return min(times)


def _products(skeleton: Skeleton, block: int, load: Load) -> int:
    """Return the multiplications per token of a block's forward: its matrices, and attention over half the tokens."""
    seen = experts_seen(skeleton.model.config.get_text_config())
    total = 0
    for parameter in skeleton.blocks[block].parameters():
        total += _used(parameter, seen)
    queries = sum(
        weight.shape[0]
        for name, weight in skeleton.blocks[block].named_parameters()
        if weight.ndim == 2 and "q_proj" in name
    )
    return total + queries * load.longest


def _targets(skeleton: Skeleton, plan: Plan, group: tuple[int, ...]) -> int:
    """Return the multiplications per token of the weight gradients of a group's targets."""
    seen = experts_seen(skeleton.model.config.get_text_config())
    return sum(_used(skeleton.model.get_parameter(name), seen) for name in plan.names(group))


def _used(parameter: nn.Parameter, seen: int | None) -> int:
    """Return the entries of a parameter that a token is multiplied with; of a stack of experts it sees a few."""
    if parameter.ndim < 2:
        return 0
    if parameter.ndim == 2:
        return parameter.numel()
    return parameter.numel() // parameter.shape[0] * min(seen or parameter.shape[0], parameter.shape[0])


def _head(skeleton: Skeleton) -> int:
    head = skeleton.model.get_output_embeddings()
    return head.weight.numel() if head is not None and hasattr(head, "weight") else 0
