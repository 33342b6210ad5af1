"""The k highest of very many scores, exactly, ties going to the lower index, without sorting them all.

A *bracket* from a sample holds the k-th highest score almost surely. What lies above it is kept at sight, what lies
below is not; the few inside are settled at the end. Where one quota spans tensors that are not in memory together, a
*tally* counts instead: float32 scores have an order-preserving integer key, and a histogram of the keys inside the
bracket finds the exact threshold in one or two passes of constant memory.

Scores are float32; -inf is never selected, NaN neither. numpy only.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats
from fisherkit.kernels.prune_scores import LOWEST, Flags

SAMPLE = 1 << 17
"""Scores that a bracket is taken from."""
_SIGMAS = 4.5  # how far a bracket reaches: a miss costs a second pass, never a wrong result
_BINS = 1 << 16
_EVERYTHING = (LOWEST, np.float32(np.inf))


def quota(density: Fraction, count: int) -> int:
    """``floor(density * count)`` without floating error: 0.1 of 1000 is 100."""
    return math.floor(density * count)


@dataclass(frozen=True)
class ThresholdRange:
    """Scores above ``high`` are kept, those from ``low`` to ``high`` are candidates."""

    low: np.float32
    high: np.float32


EVERYTHING = ThresholdRange(*_EVERYTHING)


def threshold_range(sample: Floats, kept: int, count: int) -> ThresholdRange:
    """Where the ``kept``-th highest of ``count`` scores lies, judging by a sample of them.

    Args:
        sample: some of the scores, drawn evenly; all of them give the exact threshold or nearly so.
        kept: how many are to be kept, at least 1.
        count: how many there are.
    """
    size = sample.size
    if size < 1024 or size * 4 > count:  # too few to judge by, or too few to be worth it
        return EVERYTHING
    share = kept / count
    margin = _SIGMAS * math.sqrt(share * (1 - share) / size) + 8 / size
    high, low = math.floor((share - margin) * size), math.ceil((share + margin) * size)
    falling = -np.where(np.isnan(sample), -np.inf, sample)
    falling.partition([rank for rank in (high, low) if 0 <= rank < size] or 0)  # a third of what sorting takes
    return ThresholdRange(
        max(-falling[low], LOWEST) if low < size else LOWEST,
        -falling[high] if high >= 0 else np.float32(np.inf),
    )


def sample_size(count: int) -> int:
    """Scores to take a bracket of ``count`` from: a larger sample costs more, a wider bracket leaves more to settle."""
    return min(SAMPLE, int(1.7 * count ** (2 / 3)), max(1, count // 16))


def top_k_mask(candidates: Floats, wanted: int) -> Flags:
    """Flags of the ``wanted`` highest candidates, which are given in the order of their indices."""
    if wanted >= candidates.size:
        return np.ones(candidates.size, np.bool_)
    if wanted <= 0:
        return np.zeros(candidates.size, np.bool_)
    threshold = np.partition(candidates, candidates.size - wanted)[candidates.size - wanted]
    chosen: Flags = candidates > threshold
    ties = np.flatnonzero(candidates == threshold)
    chosen[ties[: wanted - int(np.count_nonzero(chosen))]] = True
    return chosen


def keys(scores: Floats) -> NDArray[np.int64]:
    """Integers in the order of the scores, equal for equal scores; neighbours in float32 are neighbours here."""
    bits = scores.astype(np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def from_key(key: int) -> np.float32:
    """The score of a key; of the two zeros, the positive one."""
    bits = key if key >= 0 else 0x80000000 | -key
    return np.float32(np.array([bits], np.uint32).view(np.float32)[0])


@dataclass(frozen=True)
class Threshold:
    """An exact threshold over several tensors: scores above ``at`` are kept, and the first ``ties`` of those equal."""

    at: np.float32
    ties: int

    @property
    def threshold_range(self) -> ThresholdRange:
        """For the pass that keeps: the ties are its candidates."""
        return ThresholdRange(self.at, self.at)


Counted = tuple[int, NDArray[np.int64]]
"""Scores above a bracket, and a histogram of those inside."""


class HistogramSelect:
    """Finds the exact ``kept``-th highest of all scores that are shown to it, pass by pass.

    ``count`` every block, then ``narrow``; again, as long as that returns None. Memory does not depend on how many
    scores there are.
    """

    def __init__(self, start: ThresholdRange, kept: int) -> None:
        self._kept = kept
        self._set(*(int(key) for key in keys(np.array([start.low, start.high], np.float32))))

    def _set(self, low: int, high: int) -> None:
        self._low, self._high = low, high
        self._step = max(1, -(-(high - low + 1) // _BINS))
        self._above = 0
        self._bins = np.zeros(-(-(high - low + 1) // self._step), np.int64)

    def count(self, scores: Floats) -> Counted:
        """What a block adds, without adding it: threads may call this at the same time."""
        low, high = from_key(self._low), from_key(self._high)
        above = scores > high
        inside = scores[(scores >= low) & ~above]
        numbers = (keys(inside) - self._low) // self._step
        return int(np.count_nonzero(above)), np.bincount(numbers, minlength=self._bins.size)

    def add(self, counted: Counted) -> None:
        """Add what ``count`` returned."""
        self._above += counted[0]
        self._bins += counted[1]

    def narrow(self) -> "Threshold | None":
        """The cut, once every block was added; None if another pass is needed."""
        wanted = self._kept - self._above
        if wanted < 1 and self._kept > 0:  # the bracket lies too low
            self._set(self._high + 1, int(keys(np.array([np.inf], np.float32))[0]))
            return None
        reached = np.cumsum(self._bins[::-1])
        if not reached.size or reached[-1] < wanted:  # too high, or not that many scores
            lowest = int(keys(np.array([LOWEST], np.float32))[0])
            if self._low <= lowest:
                return Threshold(from_key(lowest), int(self._bins.sum()))
            self._set(lowest, self._low - 1)
            return None
        place = int(np.searchsorted(reached, max(wanted, 1)))
        number = self._bins.size - 1 - place
        low = self._low + number * self._step
        if self._step == 1:
            return Threshold(from_key(low), wanted - (int(reached[place - 1]) if place else 0))
        self._set(low, min(low + self._step - 1, self._high))
        return None
