"""Plan of a run: targets, groups of blocks, and memory. Pure functions of model, options and free memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fisherkit.engine.model.build import blocks_in_groups
from fisherkit.engine.model.linear_layers import find_linear_layers
from fisherkit.engine.model.skeleton import Skeleton, TargetTensor
from fisherkit.errors import OptionError

BASE_BYTES = 600 << 20  # Python, torch and transformers themselves
HEADROOM = 0.85  # of the memory that is there


@dataclass(frozen=True)
class Plan:
    """Groups of blocks that are resident together, and targets.

    Attributes:
        groups: block numbers, consecutive.
        targets: block (None: around the blocks) -> parameter -> checkpoint tensors that it stands for.
    """

    groups: tuple[tuple[int, ...], ...]
    targets: Mapping[int | None, Mapping[str, tuple[TargetTensor, ...]]]

    @property
    def tensors(self) -> tuple[TargetTensor, ...]:
        """Tensors of the Fisher, in model order."""
        every = (tensor for own in self.targets.values() for tensors in own.values() for tensor in tensors)
        return tuple(dict.fromkeys(every))  # several parameters may make up one tensor

    @property
    def parameters(self) -> int:
        """Number of weights measured."""
        return sum(tensor.numel for tensor in self.tensors)

    def names(self, blocks: Sequence[int | None]) -> list[str]:
        """Return the names of the parameters measured in the given blocks."""
        return [name for block in blocks for name in self.targets.get(block, {})]


def choose_targets(
    skeleton: Skeleton, targets: str, layers: Sequence[int] | None
) -> dict[int | None, dict[str, tuple[TargetTensor, ...]]]:
    """Choose the parameters and checkpoint tensors to measure.

    Args:
        skeleton: the model.
        targets: ``matrices`` (two or more axes, inside the blocks), ``all``, or a regular expression that is searched
            in checkpoint tensor names of the whole text model.
        layers: block numbers, or None for all of them (and, unless ``matrices``, what lies around them).

    Raises:
        OptionError: no such layer, or nothing matches.
    """
    count = len(skeleton.blocks)
    beyond = [layer for layer in layers or () if layer >= count]
    if beyond:
        raise OptionError(f"--layers {beyond[0]}: the model has {count} layers, 0 to {count - 1}")
    blocks: list[int | None] = list(layers) if layers is not None else list(range(count))
    if targets != "matrices" and layers is None:
        blocks.append(None)
    chosen: dict[int | None, dict[str, tuple[TargetTensor, ...]]] = {}
    for block in blocks:
        own = skeleton.parameters(block)
        # Of weights that blocks share, the checkpoint holds one: they are measured once, where it lies.
        inside = [name for name in own if block is None or name not in skeleton.tied]
        wanted = [name for name in inside if targets != "matrices" or own[name].ndim >= 2]
        described = skeleton.describe(wanted, block)
        if targets not in ("matrices", "all"):
            described = {
                name: tuple(tensor for tensor in tensors if re.search(targets, tensor.name))
                for name, tensors in described.items()
            }
        kept = {name: tensors for name, tensors in described.items() if tensors}
        if kept:
            chosen[block] = kept
    if not chosen:
        raise OptionError(f"--targets {targets}: no tensor of the text model matches")
    return chosen


def only_batches_of_one(skeleton: Skeleton, plan: Plan) -> bool:
    """Return True if a target is no linear layer inside a block: it is left to autograd, which sums over a batch."""
    inside = [name for block in plan.targets if block is not None for name in plan.targets[block]]
    return None in plan.targets or bool(find_linear_layers(skeleton.model, inside, frozenset())[1])


@dataclass(frozen=True)
class Needs:
    """Peak bytes of a run."""

    host: int
    device: int


def needs(
    skeleton: Skeleton,
    plan: Plan,
    *,
    batch_tokens: int,
    longest: int,
    on_host: bool,
    covariances: Mapping[int | None, int] | None = None,
) -> Needs:
    """Estimate the peak memory of a streamed run: two groups' weights (one is read ahead), accumulators, one batch.

    Args:
        skeleton: the model on the meta device.
        plan: targets and groups.
        batch_tokens: padded tokens of a batch.
        longest: tokens of the longest sample, which the head sees alone.
        on_host: whether the device's memory is the host's.
        covariances: bytes of covariances by block, where they are gathered, and under None what one takes besides.
    """
    size = torch.empty((), dtype=skeleton.dtype).element_size()
    batch_tokens = max(batch_tokens, longest)  # a sample is never split
    group = max(_group_bytes(skeleton, plan, group, size, batch_tokens, covariances or {}) for group in plan.groups)
    ahead = max(sum(block_weights(skeleton, block) for block in group) * size for group in plan.groups)
    around = sum(parameter.numel() for parameter in skeleton.parameters(None).values())
    outer = _measured(skeleton, plan, None)
    head = skeleton.model.get_output_embeddings()
    vocabulary = head.weight.shape[0] if head is not None and hasattr(head, "weight") else 0
    logits = longest * vocabulary * (2 * size + 12)
    device = around * size + max(group, logits + outer * (4 + size))
    host = BASE_BYTES + ahead + (device if on_host else 0)
    return Needs(host=host, device=device)


def fit_groups(
    skeleton: Skeleton,
    plan: Plan,
    group_size: int,
    room: int,
    *,
    batch_tokens: int,
    longest: int,
    on_host: bool,
    covariances: Mapping[int | None, int] | None = None,
) -> Plan:
    """Return the plan with the largest group size up to ``group_size`` whose needs fit ``room`` bytes (at least 1).

    Args: as of ``needs``.
    """
    for size in range(min(group_size, len(skeleton.blocks)), 0, -1):
        plan = Plan(blocks_in_groups(len(skeleton.blocks), size), plan.targets)
        need = needs(
            skeleton, plan, batch_tokens=batch_tokens, longest=longest, on_host=on_host, covariances=covariances
        )
        if (need.host if on_host else need.device) <= HEADROOM * room:
            break
    return plan


def _group_bytes(
    skeleton: Skeleton,
    plan: Plan,
    group: Sequence[int],
    size: int,
    batch_tokens: int,
    covariances: Mapping[int | None, int],
) -> int:
    weights = sum(block_weights(skeleton, block) for block in group) * size
    accumulators = 4 * sum(_measured(skeleton, plan, block) for block in group)
    kept = sum(block_activations(skeleton.blocks[block]) for block in group) * size * batch_tokens
    return weights + accumulators + kept + sum(covariances.get(block, 0) for block in (*group, None))


def _measured(skeleton: Skeleton, plan: Plan, block: int | None) -> int:
    own = skeleton.parameters(block)
    return sum(own[name].numel() for name in plan.names([block]))


def block_weights(skeleton: Skeleton, block: int) -> int:
    """Return the number of weights of a block."""
    return sum(parameter.numel() for parameter in skeleton.parameters(block).values())


def block_activations(block: nn.Module) -> int:
    """Estimate the numbers per token that a replay of the block keeps: in- and outputs of its linear layers, twice."""
    matrices = (parameter.shape for parameter in block.parameters() if parameter.ndim == 2)
    return 2 * sum(sum(shape) for shape in matrices)
