"""Ranking of the units of weights that are never in memory together: scores by block, exact quotas, flags.

Two ways. Combined scores are few (a row of a 31B model is one of four million) and are held. Scores of single entries
are not: a histogram select finds the exact threshold in passes of constant memory, and a last pass writes the flags.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fisherkit.floats import Floats
from fisherkit.kernels.mask_scores import (
    Doubles,
    Flags,
    Units,
    coarse_counts,
    coarse_range,
    coarse_threshold,
    combined,
    is_coarse,
    joined,
    top,
)
from fisherkit.kernels.prune_scores import BLOCK
from fisherkit.kernels.top_k import HistogramSelect, Threshold, exact_thresholds
from fisherkit.pairs.parallel import BlockPool

Block = Callable[[int, int], Floats]
"""Scores of the entries from one flat index to another; never more than BLOCK, and starting at a multiple of it,
unless a row is longer."""
_AT_ONCE = 64  # blocks whose flags wait for their turn


@dataclass(frozen=True)
class Ranked:
    """Flags of a stretch of entries, in order.

    Attributes:
        start: index of the first.
        flags: whether an entry is among the top.
        tied: how many of those flags were given by index, to entries that score exactly zero.
    """

    start: int
    flags: Flags
    tied: int


def unit_scores(units: Units, combine: str, block: Block, pool: BlockPool) -> Doubles:
    """Return the combined scores of the units of one weight, flat [units].

    Args:
        units: how the weight is divided; ``over`` is given.
        combine: ``sum``, ``mean`` or ``max``.
        block: scores of its entries.
        pool: threads.
    """
    if not units.numel:
        return np.zeros(units.count)
    height, width = units.matrices[1:]
    step = max(1, BLOCK // width)

    def rows(first: int, start: int, stop: int) -> Doubles:
        scores = block((first + start) * width, (first + stop) * width).reshape(-1, width)
        return combined(combine, scores, 1 if units.along_rows else 0)

    def matrix(first: int) -> Doubles:
        return joined(combine, pool.map(functools.partial(rows, first), height, step))

    if units.along_rows:
        found = np.concatenate(pool.map(functools.partial(rows, 0), units.matrices[0] * height, step))
    else:
        found = np.concatenate([matrix(number * height) for number in range(units.matrices[0])])
    return found / units.size if combine == "mean" else found


def entry_vector(units: Units, block: Block, pool: BlockPool) -> Doubles:
    """Return the scores of the entries of one small weight, flat.

    Args:
        units: how the weight is divided; a unit per entry.
        block: scores of its entries.
        pool: threads.
    """
    return np.concatenate(pool.map(block, units.numel, BLOCK)).astype(np.float64)


def top_of_group(scores: Sequence[Doubles], wanted: int) -> list[Flags]:
    """Return flags of the highest of all scores together, by weight.

    Ties go to the earlier weight, then to the lower index.

    Args:
        scores: [units] of each weight, in order.
        wanted: how many are the top.
    """
    flags = top(np.concatenate(scores), wanted)
    return np.split(flags, np.cumsum([part.size for part in scores])[:-1])


def find_threshold(weights: Mapping[str, tuple[int, Block]], wanted: int, pool: BlockPool) -> Threshold:
    """Return the exact threshold over the entries of several weights.

    A first pass counts the scores by the upper half of their bits. Those of a Fisher in bfloat16 have no other half:
    this is all. Otherwise one more pass over what lies near makes it exact.

    Args:
        weights: size and scores of each.
        wanted: how many entries are the top; at least one.
        pool: threads.
    """
    counts, lock, fine = np.zeros(1 << 16, np.int64), threading.Lock(), threading.Event()

    def coarsely(block: Block, start: int, stop: int) -> None:
        scores = block(start, stop)
        counted = coarse_counts(scores)
        if not fine.is_set() and not is_coarse(scores):
            fine.set()
        with lock:
            np.add(counts, counted, out=counts)

    _visit(weights, coarsely, pool)
    found = None if fine.is_set() else coarse_threshold(counts, wanted)
    if found is not None:
        return found
    select = HistogramSelect(coarse_range(counts, wanted), wanted)

    def exactly(block: Block, start: int, stop: int) -> None:
        select.show(block(start, stop))

    return exact_thresholds({"": select}, lambda _: _visit(weights, exactly, pool))[""]


def _visit(weights: Mapping[str, tuple[int, Block]], count: Callable[[Block, int, int], None], pool: BlockPool) -> None:
    for size, block in weights.values():
        pool.map(functools.partial(count, block), size, BLOCK)


class ThresholdMask:
    """Applies a threshold to weight after weight, in the order in which they were counted.

    Entries that score just the threshold go to the first weights it meets, until its ties are spent.
    """

    def __init__(self, threshold: Threshold | None) -> None:
        self._threshold = threshold
        self._ties = threshold.ties if threshold else 0

    def ranked(self, count: int, block: Block, pool: BlockPool) -> Iterator[Ranked]:
        """Yield the flags of one weight, stretch by stretch.

        Args:
            count: entries of the weight.
            block: their scores.
            pool: threads.
        """
        for first in range(0, count, BLOCK * _AT_ONCE):
            stop = min(first + BLOCK * _AT_ONCE, count)
            start = first
            for above, equal in pool.map(functools.partial(self._compare, block, first), stop - first, BLOCK):
                tied = self._keep_ties(above, equal)
                yield Ranked(start, above, tied)
                start += above.size

    def _compare(self, block: Block, first: int, start: int, stop: int) -> tuple[Flags, Flags]:
        scores = block(first + start, first + stop)
        if self._threshold is None:
            return np.zeros(scores.size, np.bool_), np.zeros(scores.size, np.bool_)
        return scores > self._threshold.at, scores == self._threshold.at

    def _keep_ties(self, above: Flags, equal: Flags) -> int:
        """Put as many of the equal ones into ``above`` as still fit; how many of them score zero."""
        if not self._ties:
            return 0
        chosen = np.flatnonzero(equal)[: self._ties]
        self._ties -= chosen.size
        above[chosen] = True
        return chosen.size if self._threshold is not None and self._threshold.at == 0 else 0
