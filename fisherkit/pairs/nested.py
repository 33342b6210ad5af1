"""Depths of one tensor: how many of several nested selections keep each entry; and a tensor of one of them, from that.

The result of every selection is that of pairs.prune, bit for bit; see kernels.nested.
"""

from collections.abc import Sequence

import numpy as np

from fisherkit.kernels.nested import BlockDepths, Depths, add_top_candidates, count_block
from fisherkit.kernels.prune import block_scores, copy_flagged, sample_scores
from fisherkit.kernels.prune_scores import BLOCK, drawing
from fisherkit.kernels.tensor_pair import TensorPair
from fisherkit.kernels.top_k import (
    EVERYTHING,
    NOTHING,
    HistogramSelect,
    Threshold,
    ThresholdRange,
    exact_thresholds,
    sample_size,
    threshold_range,
)
from fisherkit.pairs.parallel import BlockPool, block_starts


def depths_by_quota(
    pair: TensorPair, quotas: Sequence[int], pool: BlockPool, *, seed: int, stream: int
) -> tuple[Depths, int]:
    """Return the depths [n] of a tensor whose selections keep so many entries each, and how many are not finite.

    Args:
        pair: the whole tensor; not changed.
        quotas: entries that each selection keeps, if as many have a claim.
        pool: threads.
        seed: of random scores.
        stream: of the tensor's random numbers.
    """
    size = pair.base.size
    sample = sample_scores(pair, sample_size(size), seed, stream)
    ranges = [threshold_range(sample, kept, size) if kept else NOTHING for kept in quotas]
    depths, blocks = _count(pair, ranges, pool, seed, stream)
    wanted, missed = [], []
    for at, (kept, guess) in enumerate(zip(quotas, ranges, strict=True)):
        above = sum(block.above[at] for block in blocks)
        inside = sum(block.scores[at].size for block in blocks)
        wanted.append(kept - above)
        if above > kept or (above + inside < kept and guess.low > EVERYTHING.low):
            missed.append(at)  # the sample has misled
    if missed:
        exact = _exact_thresholds(pair, {at: quotas[at] for at in missed}, pool, seed, stream)
        for at, threshold in exact.items():
            ranges[at], wanted[at] = threshold.threshold_range, threshold.ties
        depths, blocks = _count(pair, ranges, pool, seed, stream)
    return _complete(depths, blocks, wanted)


def depths_by_threshold(
    pair: TensorPair, thresholds: Sequence[Threshold], pool: BlockPool, *, seed: int, stream: int
) -> tuple[Depths, int]:
    """Return the depths [n] of a tensor whose selections have exact thresholds, and how many entries are not finite.

    Args:
        pair: the whole tensor; not changed.
        thresholds: of each selection, with the ties that it keeps.
        pool: threads.
        seed: of random scores.
        stream: of the tensor's random numbers.
    """
    depths, blocks = _count(pair, [one.threshold_range for one in thresholds], pool, seed, stream)
    return _complete(depths, blocks, [one.ties for one in thresholds])


def take_deeper(pair: TensorPair, depths: Depths, than: int, pool: BlockPool) -> None:
    """Overwrite the base's entries with FT's where more selections than so many keep them.

    Args:
        pair: the whole tensor.
        depths: [n] its depths.
        than: number of selections.
        pool: threads.
    """

    def one(start: int, stop: int) -> None:
        copy_flagged(pair.part(start, stop), depths[start:stop] > than, pool.scratch)

    pool.map(one, pair.base.size)


def _count(
    pair: TensorPair, ranges: Sequence[ThresholdRange], pool: BlockPool, seed: int, stream: int
) -> tuple[Depths, list[BlockDepths]]:
    depths = np.empty(pair.base.size, np.uint8)

    def one(start: int, stop: int) -> BlockDepths:
        draw = drawing(seed, stream, start // BLOCK)
        return count_block(pair.part(start, stop), ranges, pool.scratch, draw, depths[start:stop])

    return depths, pool.map(one, pair.base.size)


def _complete(depths: Depths, blocks: Sequence[BlockDepths], wanted: Sequence[int]) -> tuple[Depths, int]:
    starts = block_starts(depths.size)
    for at, count in enumerate(wanted):
        add_top_candidates(depths, blocks, starts, at, count)
    return depths, sum(block.nonfinite for block in blocks)


def _exact_thresholds(
    pair: TensorPair, quotas: dict[int, int], pool: BlockPool, seed: int, stream: int
) -> dict[int, Threshold]:
    """Find thresholds by counting scores, pass by pass."""
    selects = {at: HistogramSelect(EVERYTHING, kept) for at, kept in quotas.items()}

    def show(start: int, stop: int) -> None:
        scores = block_scores(pair.part(start, stop), pool.scratch, seed, stream, start)
        for select in selects.values():
            select.show(scores)

    return exact_thresholds(selects, lambda _: pool.map(show, pair.base.size))
