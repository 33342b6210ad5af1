"""Exact selection of the k highest of very many scores, ties going to the lower index, without sorting them all.

A *threshold range* from a sample holds the k-th highest score almost surely. What lies above it is kept at sight, what
lies below is not; among the few inside, the *candidates*, the rest is chosen at the end. Where one quota spans tensors
that are not in memory together, a *histogram select* counts instead: float32 scores have an order-preserving integer
key, and a histogram of the keys inside the range finds the exact threshold in one or two passes of constant memory.

Scores are float32; -inf is never selected, NaN neither. numpy only.
"""

import math
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats
from fisherkit.kernels.prune_scores import LOWEST, Flags

SAMPLE = 1 << 17
"""Scores that a threshold range is taken from."""
_SIGMAS = 4.5  # how far a range reaches: a miss costs a second pass, never a wrong result
_BINS = 1 << 16

Key = TypeVar("Key", bound=Hashable)
Counted = tuple[int, NDArray[np.int64]]
"""Number of scores above a threshold range, and a histogram of those inside."""


def quota(density: Fraction, count: int) -> int:
    """Return ``floor(density * count)`` without floating error: 0.1 of 1000 is 100."""
    return math.floor(density * count)


@dataclass(frozen=True)
class ThresholdRange:
    """Scores above ``high`` are kept, those from ``low`` to ``high`` are candidates."""

    low: np.float32
    high: np.float32


EVERYTHING = ThresholdRange(LOWEST, np.float32(np.inf))
"""All scores that can be kept are candidates."""
NOTHING = ThresholdRange(np.float32(np.inf), np.float32(np.inf))
"""No score is kept, and none is a candidate."""


@dataclass(frozen=True)
class Threshold:
    """An exact threshold over several tensors: scores above ``at`` are kept, and the first ``ties`` of those equal."""

    at: np.float32
    ties: int

    @property
    def threshold_range(self) -> ThresholdRange:
        """Range for the pass that keeps: the ties are its candidates."""
        return ThresholdRange(self.at, self.at)


def threshold_range(sample: Floats, kept: int, count: int) -> ThresholdRange:
    """Return the range in which the ``kept``-th highest of ``count`` scores lies, judging by a sample of them.

    Args:
        sample: [S] float32, some of the scores, drawn evenly; all of them give the threshold or nearly so.
        kept: how many are to be kept, at least 1.
        count: how many scores there are.
    """
    size = sample.size
    if size < 1024 or size * 4 > count:  # too few to judge by, or too few to be worth it
        return EVERYTHING
    # The share of a sample that lies above the threshold is binomial; the range reaches _SIGMAS of its deviations.
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
    """Return how many of ``count`` scores to sample.

    A larger sample costs more, a smaller one gives a wider range with more candidates to choose among at the end.
    """
    return min(SAMPLE, int(1.7 * count ** (2 / 3)), max(1, count // 16))


def top_k_mask(candidates: Floats, wanted: int) -> Flags:
    """Return flags [C] of the ``wanted`` highest of C candidates, which are given in the order of their indices."""
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
    """Return integers in the order of the scores, equal for equal scores; neighbours in float32 differ by one."""
    # As an int32 a float's bits order as the number does, but for the sign, which is kept apart: -0.0 and 0.0 are 0.
    bits = scores.astype(np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def from_key(key: int) -> np.float32:
    """Return the score of a key; of the two zeros, the positive one."""
    bits = key if key >= 0 else 0x80000000 | -key
    return np.float32(np.array([bits], np.uint32).view(np.float32)[0])


class HistogramSelect:
    """Finds the exact ``kept``-th highest of all scores that are shown to it, pass by pass, in constant memory.

    ``show`` every block of scores, from any thread, then ``narrow``; again, as long as that returns None.
    ``exact_thresholds`` does just that for any number of them.
    """

    def __init__(self, start: ThresholdRange, kept: int) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._set(*(int(key) for key in keys(np.array([start.low, start.high], np.float32))))

    def _set(self, low: int, high: int) -> None:
        """Count between these keys in the next pass."""
        self._low, self._high = low, high
        self._step = max(1, -(-(high - low + 1) // _BINS))
        self._above = 0
        self._bins = np.zeros(-(-(high - low + 1) // self._step), np.int64)

    def show(self, scores: Floats) -> None:
        """Count a block of scores; any number of threads may call this at the same time."""
        above, bins = self._count(scores)
        with self._lock:
            self._above += above
            self._bins += bins

    def _count(self, scores: Floats) -> Counted:
        low, high = from_key(self._low), from_key(self._high)
        above = scores > high
        inside = scores[(scores >= low) & ~above]
        numbers = (keys(inside) - self._low) // self._step
        return int(np.count_nonzero(above)), np.bincount(numbers, minlength=self._bins.size)

    def narrow(self) -> Threshold | None:
        """Return the threshold, once every block was shown; None if another pass is needed."""
        wanted = self._kept - self._above
        if wanted < 1 and self._kept > 0:  # the range lies too low: look above it
            self._set(self._high + 1, int(keys(np.array([np.inf], np.float32))[0]))
            return None
        reached = np.cumsum(self._bins[::-1])
        if not reached.size or reached[-1] < wanted:  # the range lies too high, or there are not that many scores
            lowest = int(keys(np.array([LOWEST], np.float32))[0])
            if self._low <= lowest:
                return Threshold(from_key(lowest), int(self._bins.sum()))
            self._set(lowest, self._low - 1)
            return None
        place = int(np.searchsorted(reached, max(wanted, 1)))
        number = self._bins.size - 1 - place
        low = self._low + number * self._step
        if self._step == 1:  # a bin is a single score
            return Threshold(from_key(low), wanted - (int(reached[place - 1]) if place else 0))
        self._set(low, min(low + self._step - 1, self._high))
        return None


def exact_thresholds(
    selects: Mapping[Key, HistogramSelect], visit: Callable[[Mapping[Key, HistogramSelect]], object]
) -> dict[Key, Threshold]:
    """Return the exact threshold of every histogram select, after as many passes over the scores as it takes.

    Args:
        selects: what is looked for, each with a key.
        visit: makes one pass: shows every block of scores once to those of the selects, given by key, that it is for.
    """
    pending, found = dict(selects), dict[Key, Threshold]()
    while pending:
        visit(pending)
        narrowed = {key: select.narrow() for key, select in pending.items()}
        found |= {key: threshold for key, threshold in narrowed.items() if threshold is not None}
        pending = {key: select for key, select in pending.items() if key not in found}
    return found
