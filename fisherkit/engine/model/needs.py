"""Estimate of the memory that a streamed run takes at its peak.

An estimate is meant to lie above what a run takes and not far above it; ``benchmarks/plan.py`` holds it against
measured peaks. Pure functions of model and plan.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fisherkit.checkpoint.dtypes import DTYPES
from fisherkit.engine.model.copies import STAGING_BYTES
from fisherkit.engine.model.linear_layers import find_linear_layers
from fisherkit.engine.model.plan import Plan, replays_of
from fisherkit.engine.model.skeleton import Skeleton

IMPORTED_BYTES = 270 << 20  # of Python, torch and transformers themselves
BASE_BYTES = IMPORTED_BYTES + (140 << 20)  # with threads, buffers of products, and gaps in the heap
HEADROOM = 0.92  # of the memory that there is; a plan is never filled to the last byte
_VOCABULARY_BYTES = 600  # of the tokenizer, per entry
_TOKEN_BYTES = 80  # of a prompt's token in Python: its number, its mark, and their places in lists


@dataclass(frozen=True)
class Needs:
    """Peak bytes of a run: of the host's memory (the device's too, where that is the host's) and of the device's."""

    host: int
    device: int


@dataclass(frozen=True)
class Rooms:
    """Bytes that a run may take.

    Attributes:
        host: of the host's memory.
        device: of the device's own memory; None where it is the host's.
    """

    host: int
    device: int | None = None

    def hold(self, need: Needs) -> bool:
        """Return whether the needs fit, with some headroom."""
        return need.host <= HEADROOM * self.host and (self.device is None or need.device <= HEADROOM * self.device)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is pushed through the model.

    Attributes:
        batch_tokens: padded tokens of the largest batch.
        longest: tokens of the longest sample, which the head sees alone.
        tokens: of all samples.
        covariances: bytes of covariances by block, where they are gathered, and under None what one takes besides.
        inputs_only: nothing but covariances is gathered, by one forward.
    """

    batch_tokens: int
    longest: int
    tokens: int
    covariances: Mapping[int | None, int] = field(default_factory=dict)
    inputs_only: bool = False


@dataclass(frozen=True)
class _Block:
    """Bytes and counts of one block, or of what is around the blocks.

    Attributes:
        held: bytes of its weights as they are computed in.
        stored: bytes of its tensors in the checkpoint.
        staged: of these, bytes that are in memory beside their weights while it is loaded.
        measured: weights that are targets.
        general: of these, weights whose gradient autograd makes.
        fused: of the targets, weights that are cut into tensors of the checkpoint.
        kept: numbers that a replay keeps per token.
    """

    held: int
    stored: int
    staged: int
    measured: int
    general: int
    fused: int
    kept: int


class Estimate:
    """Memory of runs of one model; of one set of targets under any grouping.

    Args:
        skeleton: the model on the meta device.
        plan: its targets.
        load: what is pushed through it.
        on_host: whether the device's memory is the host's.
    """

    def __init__(self, skeleton: Skeleton, plan: Plan, load: Load, *, on_host: bool) -> None:
        self.load = load
        self._skeleton, self._on_host = skeleton, on_host
        self._size = torch.empty((), dtype=skeleton.dtype).element_size()
        self._blocks = [_describe(skeleton, plan, block) for block in range(len(skeleton.blocks))]
        self._around = _describe(skeleton, plan, None)

    def needs(self, plan: Plan) -> Needs:
        """Return the peak memory of a run by this plan, of its moments the one that takes most."""
        device = max(self._moments(plan))
        ahead = max((self._read_ahead(plan, number) for number in range(len(plan.groups))), default=0)
        loading = max(sum(self._blocks[block].stored for block in group) for group in plan.groups)
        copied = 4 * max(one.measured for one in (*self._blocks, self._around))  # to the host, to be written
        vocabulary = self._skeleton.model.get_input_embeddings().weight.shape[0]
        host = BASE_BYTES + _VOCABULARY_BYTES * vocabulary + _TOKEN_BYTES * self.load.tokens
        host += 0 if self._on_host else max(loading, self._around.stored) + ahead + copied + 2 * STAGING_BYTES
        return Needs(host=host + (device if self._on_host else 0), device=device)

    def resident_bytes(self, plan: Plan) -> int:
        """Return the peak memory of the device where the whole model is kept, one sample at a time going through it."""
        blocks = [*self._blocks, self._around]
        groups = [[self._blocks[block] for block in group] for group in plan.groups] + [[self._around]]
        gathered = [sum(self.load.covariances.get(block, 0) for block in (*group, None)) for group in plan.groups] + [0]
        sums = max(
            (4 + self._size) * sum(block.measured for block in group) + extra
            for group, extra in zip(groups, gathered, strict=True)
        )
        kept = self._size * sum(block.kept for block in blocks) * self.load.longest
        return sum(block.held for block in blocks) + sums + kept + self._head()

    def stored_bytes(self, blocks: Sequence[int | None]) -> int:
        """Return the bytes that some blocks (None: what is around them) have in the checkpoint."""
        return sum((self._around if block is None else self._blocks[block]).stored for block in blocks)

    def boundary_bytes(self, plan: Plan) -> int:
        """Return the bytes of all hidden states between groups, and of the gradients there."""
        return (len(plan.groups) + 2) * self.load.tokens * self._hidden() * self._size

    def _moments(self, plan: Plan) -> Iterator[int]:
        """Yield the bytes of the device that each moment of a run takes which can be the peak."""
        outside = self._around.held + 8 * self.load.batch_tokens * self._hidden() * self._size
        for number, group in enumerate(plan.groups):
            blocks = [self._blocks[block] for block in group]
            held = sum(block.held for block in blocks)
            yield outside + held + sum(block.staged for block in blocks)
            for sums in self._sums(plan, group):
                head = self._head() if number == len(plan.groups) - 1 else 0
                replayed = self._size * sum(block.kept for block in blocks) * self.load.batch_tokens
                yield outside + held + self._read_ahead(plan, number) + sums + replayed + head
                fused = 4 * max(block.fused for block in blocks)
                yield outside + self._read_ahead(plan, number) + min(sums, 4 * sum(b.measured for b in blocks)) + fused
        outer = (4 + 2 * self._size) * self._around.measured
        yield outside + self._head() + outer

    def _sums(self, plan: Plan, group: Sequence[int]) -> Iterator[int]:
        """Yield the bytes of sums, and of the gradients that autograd makes for them, of each replay of a group."""
        gathered = sum(self.load.covariances.get(block, 0) for block in (*group, None))
        if self.load.inputs_only:
            yield gathered
            return
        for turn, names in enumerate(replays_of(self._skeleton, plan, group, covariances=bool(self.load.covariances))):
            own = {name: self._skeleton.model.get_parameter(name).numel() for name in names}
            general = find_linear_layers(self._skeleton.model, names, frozenset())[1]
            yield (
                4 * sum(own.values()) + 2 * self._size * sum(own[name] for name in general) + (0 if turn else gathered)
            )

    def _read_ahead(self, plan: Plan, number: int) -> int:
        """Return the bytes of the group that is read while a group computes: the one after it, or before it.

        An accelerator has them sent meanwhile, so that it takes them, too.
        """
        if not plan.read_ahead:
            return 0
        beside = [plan.groups[at] for at in (number - 1, number + 1) if 0 <= at < len(plan.groups)]
        return max((sum(self._blocks[block].stored for block in group) for group in beside), default=0)

    def _head(self) -> int:
        """Return the bytes of one sample's logits, their softmax in float32, and the gradients of both."""
        head = self._skeleton.model.get_output_embeddings()
        vocabulary = head.weight.shape[0] if head is not None and hasattr(head, "weight") else 0
        return 0 if self.load.inputs_only else self.load.longest * vocabulary * (4 * self._size + 12)

    def _hidden(self) -> int:
        return int(self._skeleton.model.get_input_embeddings().weight.shape[-1])


def _describe(skeleton: Skeleton, plan: Plan, block: int | None) -> _Block:
    own, names = skeleton.parameters(block), plan.names([block])
    size = torch.empty((), dtype=skeleton.dtype).element_size()
    held = size * sum(parameter.numel() for parameter in own.values())
    stored, staged = held, 0
    if skeleton.index is not None:
        tensors = skeleton.outer_tensors() if block is None else skeleton.block_tensors([block])
        infos = [skeleton.index.tensors[name] for name in tensors]
        stored = sum(info.nbytes for info in infos)
        staged = sum(
            info.nbytes
            for info in infos
            if DTYPES[info.dtype].bits != 8 * size or skeleton.names.parameter_of[info.name] in skeleton.names.converted
        )
    general = find_linear_layers(skeleton.model, names, frozenset())[1] if block is not None else names
    fused = [name for name, tensors in plan.targets.get(block, {}).items() if len(tensors) > 1]
    return _Block(
        held=held,
        stored=stored,
        staged=staged,
        measured=sum(own[name].numel() for name in names),
        general=sum(own[name].numel() for name in general),
        fused=sum(own[name].numel() for name in fused),
        kept=block_activations(skeleton.blocks[block], skeleton.model.config.get_text_config())
        if block is not None
        else 0,
    )


def experts_seen(config: object) -> int | None:
    """Return how many experts of a block a token goes through; None where the config does not say."""
    return getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)


def block_weights(skeleton: Skeleton, block: int) -> int:
    """Return the number of weights of a block."""
    return sum(parameter.numel() for parameter in skeleton.parameters(block).values())


def block_activations(block: nn.Module, config: object = None) -> int:
    """Estimate the numbers per token that a replay of the block keeps: in- and outputs of its matrices, twice.

    Of a stack of experts a token sees as many as the config says, or all of them.
    """
    total = 0
    for parameter in block.parameters():
        if parameter.ndim == 2:
            total += sum(parameter.shape)
        elif parameter.ndim == 3:
            total += sum(parameter.shape[1:]) * (experts_seen(config) or parameter.shape[0])
    return 2 * total
