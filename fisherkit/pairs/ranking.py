"""Ranking the units of weights that are never in memory together: scores by block, exact quotas, flags.

Two ways. Combined scores are few (a row of a 31B model is one of four million) and are held. Scores of single entries
are not: a tally finds the exact threshold in passes of constant memory, and a last pass writes the flags.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fisherkit.floats import Floats
from fisherkit.kernels.mask_scores import Doubles, Flags, Units, coarse_counts, coarse_range, combined, joined, top
from fisherkit.kernels.prune_scores import BLOCK
from fisherkit.kernels.top_k import HistogramSelect, Threshold
from fisherkit.pairs.parallel import BlockPool

Block = Callable[[int, int], Floats]
"""Scores of the entries from one flat index to another; never more than BLOCK, and starting at a multiple of it,
unless a row is longer."""
_AT_ONCE = 64  # blocks whose flags wait for their turn


@dataclass(frozen=True)
class Ranked:
    """The flags of a stretch of entries, in order.

    Attributes:
        start: index of the first.
        flags: whether an entry is among the top.
        tied: how many of those flags were given by index, to entries that score exactly zero.
    """

    start: int
    flags: Flags
    tied: int


def unit_scores(units: Units, combine: str, block: Block, team: BlockPool) -> Doubles:
    """The combined scores of the units of one weight, flat.

    Args:
        units: how the weight is divided; ``over`` is given.
        combine: ``sum``, ``mean`` or ``max``.
        block: scores of its entries.
        team: threads.
    """
    if not units.numel:
        return np.zeros(units.count)
    height, width = units.matrices[1:]
    step = max(1, BLOCK // width)

    def rows(first: int, start: int, stop: int) -> Doubles:
        scores = block((first + start) * width, (first + stop) * width).reshape(-1, width)
        return combined(combine, scores, 1 if units.along_rows else 0)

    def matrix(first: int) -> Doubles:
        return joined(combine, team.map(functools.partial(rows, first), height, step))

    if units.along_rows:
        found = np.concatenate(team.map(functools.partial(rows, 0), units.matrices[0] * height, step))
    else:
        found = np.concatenate([matrix(number * height) for number in range(units.matrices[0])])
    return found / units.size if combine == "mean" else found


def entry_vector(units: Units, block: Block, team: BlockPool) -> Doubles:
    """The scores of the entries of one small weight, flat."""
    return np.concatenate(team.map(block, units.numel, BLOCK)).astype(np.float64)


def top_of_group(scores: Sequence[Doubles], wanted: int) -> list[Flags]:
    """Flags of the highest of all scores together, by weight; ties go to the earlier weight, then the lower index."""
    flags = top(np.concatenate(scores), wanted)
    return np.split(flags, np.cumsum([part.size for part in scores])[:-1])


def find_threshold(weights: Mapping[str, tuple[int, Block]], wanted: int, team: BlockPool) -> Threshold:
    """The exact threshold over the entries of several weights.

    Args:
        weights: size and scores of each.
        wanted: how many entries are the top; at least one.
        team: threads.
    """
    counts, lock = np.zeros(1 << 16, np.int64), threading.Lock()

    def coarsely(block: Block, start: int, stop: int) -> None:
        counted = coarse_counts(block(start, stop))
        with lock:
            np.add(counts, counted, out=counts)

    def exactly(block: Block, start: int, stop: int) -> None:
        counted = tally.count(block(start, stop))
        with lock:
            tally.add(counted)

    _visit(weights, coarsely, team)
    tally, cut = HistogramSelect(coarse_range(counts, wanted), wanted), None
    while cut is None:
        _visit(weights, exactly, team)
        cut = tally.narrow()
    return cut


def _visit(weights: Mapping[str, tuple[int, Block]], count: Callable[[Block, int, int], None], team: BlockPool) -> None:
    for size, block in weights.values():
        team.map(functools.partial(count, block), size, BLOCK)


class ThresholdMask:
    """Applies a cut to weight after weight, in the order in which they were tallied; ties go to the first it meets."""

    def __init__(self, cut: Threshold | None) -> None:
        self._cut = cut
        self._ties = cut.ties if cut else 0

    def ranked(self, count: int, block: Block, team: BlockPool) -> Iterator[Ranked]:
        """The flags of one weight, stretch by stretch."""
        for first in range(0, count, BLOCK * _AT_ONCE):
            stop = min(first + BLOCK * _AT_ONCE, count)
            start = first
            for above, equal in team.map(functools.partial(self._compare, block, first), stop - first, BLOCK):
                tied = self._settle(above, equal)
                yield Ranked(start, above, tied)
                start += above.size

    def _compare(self, block: Block, first: int, start: int, stop: int) -> tuple[Flags, Flags]:
        scores = block(first + start, first + stop)
        if self._cut is None:
            return np.zeros(scores.size, np.bool_), np.zeros(scores.size, np.bool_)
        return scores > self._cut.at, scores == self._cut.at

    def _settle(self, above: Flags, equal: Flags) -> int:
        """Put as many of the equal ones into ``above`` as still fit; how many of them score zero."""
        chosen = np.flatnonzero(equal)[: self._ties]
        self._ties -= chosen.size
        above[chosen] = True
        return chosen.size if self._cut is not None and self._cut.at == 0 else 0
