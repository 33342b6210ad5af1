"""Plan of a run: targets, groups of blocks, and in how many parts a group's targets are measured. Pure functions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fisherkit.engine.model.linear_layers import find_linear_layers
from fisherkit.engine.model.skeleton import Skeleton, TargetTensor
from fisherkit.errors import OptionError


@dataclass(frozen=True)
class Plan:
    """Groups of blocks that are resident together, and targets.

    Attributes:
        groups: block numbers, consecutive.
        targets: block (None: around the blocks) -> parameter -> checkpoint tensors that it stands for.
        read_ahead: whether the next group's weights are read while one computes.
        sums_at_once: weights of which squares are added up at a time, where those of a group do not fit the memory: the
            group is replayed once for each such part. None for all of them.
    """

    groups: tuple[tuple[int, ...], ...]
    targets: Mapping[int | None, Mapping[str, tuple[TargetTensor, ...]]]
    read_ahead: bool = True
    sums_at_once: int | None = None

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


def replays_of(skeleton: Skeleton, plan: Plan, blocks: Sequence[int], *, covariances: bool) -> list[list[str]]:
    """Return the parameters that are measured in each replay of some blocks.

    One replay measures all of them, where their sums fit the memory together. Where not, covariances get a replay of
    their own, the first, in which no parameter is measured.

    Args:
        skeleton: the model.
        plan: its targets.
        blocks: of one group.
        covariances: whether they are gathered.
    """
    parts = parts_of(skeleton, plan, blocks, plan.sums_at_once) or [[]]
    return [[], *parts] if covariances and len(parts) > 1 else parts


def parts_of(skeleton: Skeleton, plan: Plan, blocks: Sequence[int | None], most: int | None) -> list[list[str]]:
    """Divide the parameters measured in some blocks into parts, each for one replay of the blocks.

    Parameters that make up one checkpoint tensor together stay together.

    Args:
        skeleton: the model.
        plan: its targets.
        blocks: block numbers, None for what is around them.
        most: weights of a part; what cannot be divided may have more. None for one part.
    """
    parts: list[list[str]] = []
    room = 0
    for names, size in inseparable(skeleton, plan, blocks):
        if not parts or (most is not None and size > room):
            parts.append([])
            room = most or 0
        parts[-1] += names
        room -= size
    return parts


def inseparable(skeleton: Skeleton, plan: Plan, blocks: Sequence[int | None]) -> list[tuple[list[str], int]]:
    """Return the parameters measured in some blocks, together where they share a tensor, with their weights."""
    found: list[tuple[list[str], int]] = []
    for block in blocks:
        own, owner = skeleton.parameters(block), dict[str, tuple[list[str], int]]()
        for name, tensors in plan.targets.get(block, {}).items():
            shared = {id(one): one for tensor in tensors if (one := owner.get(tensor.name)) is not None}
            names = [other for others, _ in shared.values() for other in others] + [name]
            together = names, sum(size for _, size in shared.values()) + own[name].numel()
            owner |= dict.fromkeys((key for key, one in owner.items() if id(one) in shared), together)
            owner |= {tensor.name: together for tensor in tensors}
        found += {id(one): one for one in owner.values()}.values()
    return found
