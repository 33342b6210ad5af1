"""Groups of blocks for a forward sweep, and its memory: no gradient is kept, so that only weights and a batch count."""

import torch

from fisherkit.engine.model.build import blocks_in_groups
from fisherkit.engine.model.needs import BASE_BYTES, HEADROOM, block_activations, block_weights
from fisherkit.engine.model.skeleton import Skeleton

_LOGITS_BYTES = 600 << 20
"""Pieces of logits of two models, in float32 and on their way there; see engine.sweep.last_rows."""


def forward_bytes(
    skeleton: Skeleton, group_size: int, *, batch_tokens: int, longest: int, others: int, on_host: bool
) -> int:
    """Estimate the peak memory of a forward sweep, in bytes, on the device.

    Args:
        skeleton: the model on the meta device.
        group_size: blocks that are resident together; the next group is read ahead.
        batch_tokens: padded tokens of a batch.
        longest: tokens of the longest sample, which is never split.
        others: models beside it; one of them has its embedding and head in memory when losses are taken.
        on_host: whether the device's memory is the host's.
    """
    size = torch.empty((), dtype=skeleton.dtype).element_size()
    count = len(skeleton.blocks)
    blocks = [block_weights(skeleton, block) for block in range(count)]
    group = max(sum(blocks[block] for block in group) for group in blocks_in_groups(count, group_size)) * size
    widest = max(block_activations(block) for block in skeleton.blocks) * size * max(batch_tokens, longest)
    outer = sum(parameter.numel() for parameter in skeleton.parameters(None).values()) * size
    ahead = group if count > group_size or others else 0
    sweep = outer + group + ahead + widest
    losses = outer * (2 if others else 1) + _LOGITS_BYTES
    return max(sweep, losses) + (BASE_BYTES if on_host else 0)


def fit_forward(
    skeleton: Skeleton, group_size: int, room: int, *, batch_tokens: int, longest: int, others: int, on_host: bool
) -> tuple[tuple[int, ...], ...]:
    """Return groups of the largest size up to ``group_size`` whose sweep fits ``room`` bytes (at least 1 block).

    Args: as of ``forward_bytes``.
    """
    for size in range(min(group_size, len(skeleton.blocks)), 1, -1):
        need = forward_bytes(skeleton, size, batch_tokens=batch_tokens, longest=longest, others=others, on_host=on_host)
        if need <= HEADROOM * room:
            return blocks_in_groups(len(skeleton.blocks), size)
    return blocks_in_groups(len(skeleton.blocks), 1)
