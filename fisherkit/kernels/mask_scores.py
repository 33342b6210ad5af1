"""Scores of weights, and of the units that a mask treats alike: entries, output rows, or input columns.

A *unit* of a weight is all entries along one axis (``over``), or one entry. A weight counts as matrices [L, M, N], L
being 1 or the experts, and ``over`` is one of the last two axes. Entry scores are float32, combined scores float64.
Flat numpy blocks in, scores out; knows no file.

- ``fisher``: F.
- ``magnitude``: |W|.
- ``fisher-weight``: F W^2, twice the loss that setting the weight to zero costs by a diagonal quadratic model (Optimal
  Brain Damage, LeCun 1989, with the Fisher for the second derivative).
- ``gallop``: sqrt(F) / |W|: large gradients on small weights (GaLLoP, arXiv 2510.19778; sqrt(F) is the gradient's root
  mean square over the samples).

Two Fishers f and g, each divided by its own mean over all weights, are contrasted unit by unit: ``difference`` f - g,
``relu-difference`` max(f - g, 0), and ``ratio`` f / max(g, 1e-6).
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats
from fisherkit.kernels.top_k import EVERYTHING, Threshold, ThresholdRange, top_k_mask

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

_LARGEST = np.finfo(np.float32).max
_SMALLEST = np.finfo(np.float32).tiny
_INFINITY = 0x8000 + 0x7F80  # place of infinity among the coarse counts; NaN lie above
_LITTLE = sys.byteorder == "little"
_LEAST_RATIO = 1e-6  # where the old task's Fisher is below a millionth of its mean, the new one's decides


@dataclass(frozen=True)
class Units:
    """Division of a weight into units.

    Attributes:
        shape: of the weight.
        over: the axis along which entries share a flag, one of the last two; None for a flag per entry.
    """

    shape: tuple[int, ...]
    over: int | None

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def flags_shape(self) -> tuple[int, ...]:
        """Shape of the weight without ``over``."""
        return tuple(size for axis, size in enumerate(self.shape) if axis != self.over)

    @property
    def count(self) -> int:
        """Number of units."""
        return math.prod(self.flags_shape)

    @property
    def size(self) -> int:
        """Entries per unit."""
        return 1 if self.over is None else self.shape[self.over]

    @property
    def along_rows(self) -> bool:
        """True if a unit is a run of neighbours in memory."""
        return self.over == len(self.shape) - 1

    @property
    def matrices(self) -> tuple[int, int, int]:
        """[L, M, N]."""
        return math.prod(self.shape[:-2]), self.shape[-2], self.shape[-1]


def entry_scores(score: str, f: Floats | None, w: Floats | None) -> Floats:
    """Return the scores of a block of entries.

    Args:
        score: one of the above.
        f: the Fisher's entries, unless the score does without.
        w: the weight's, unless the score does without.
    """
    if score == "fisher":
        assert f is not None
        return f
    assert w is not None
    if score == "magnitude":
        return np.abs(w)
    assert f is not None
    if score == "fisher-weight":
        return np.asarray(f * w * w)
    with np.errstate(over="ignore"):
        return np.minimum(np.sqrt(f) / np.maximum(np.abs(w), _SMALLEST), _LARGEST)


def combined(combine: str, scores: Floats, axis: int) -> Doubles:
    """Combine scores over an axis: their ``max``, or for ``sum`` and ``mean`` their sum.

    Args:
        combine: ``sum``, ``mean`` or ``max``; the caller divides a mean by the size of a unit.
        scores: [rows, columns] float32.
        axis: 0 or 1, the one that goes.
    """
    if combine == "max":
        return np.asarray(scores.max(axis=axis), np.float64)
    return np.asarray(scores.sum(axis=axis, dtype=np.float64))


def joined(combine: str, parts: list[Doubles]) -> Doubles:
    """Combine what blocks of rows give, where a unit is a column.

    Args:
        combine: as for combined.
        parts: [columns] float64 of each block of rows.
    """
    return np.asarray(np.maximum.reduce(parts) if combine == "max" else np.add.reduce(parts))


def contrasted(contrast: str, f: Doubles, g: Doubles) -> Doubles:
    """Score two Fishers against each other; both are in units of their own means.

    Args:
        contrast: ``ratio``, ``difference`` or ``relu-difference``.
        f: [n] float64 of the first Fisher.
        g: [n] float64 of the second.
    """
    if contrast == "ratio":
        return f / np.maximum(g, _LEAST_RATIO)
    return f - g if contrast == "difference" else np.maximum(f - g, 0)


def top(scores: Doubles, wanted: int) -> Flags:
    """Return flags [n] of the ``wanted`` highest scores, ties going to the lower index.

    Args:
        scores: [n] float64.
        wanted: how many.
    """
    return top_k_mask(scores, wanted)  # type: ignore[arg-type]  # any floating type will do


def coarse_counts(scores: Floats) -> NDArray[np.int64]:
    """Count the scores by the upper half of their bits, which for bfloat16 is all of them; [65536], ascending."""
    upper = scores.view(np.uint16)[1::2] if _LITTLE else scores.view(np.uint16)[::2]
    counts = np.bincount(upper, minlength=1 << 16)
    return np.concatenate([counts[:0x7FFF:-1], counts[:0x8000]])  # of negative numbers, higher bits are lower


def is_coarse(scores: Floats) -> bool:
    """Return whether the upper half of their bits is all there is to these scores, as for numbers in bfloat16."""
    return not int(np.bitwise_or.reduce(scores.view(np.uint32), initial=0)) & 0xFFFF


def coarse_threshold(counts: NDArray[np.int64], wanted: int) -> Threshold | None:
    """Return the exact threshold of scores that are coarse; None where infinities, NaN or the two zeros are in its way.

    Args:
        counts: [65536], sums of what coarse_counts returned.
        wanted: at least 1.
    """
    place = _place(counts, wanted)
    if place < 0 or counts[_INFINITY:].any():
        return None
    at = np.array([_upper(place) << 16], np.uint32).view(np.float32)[0]
    if at == 0 or not np.isfinite(at):
        return None
    return Threshold(at, wanted - int(counts[place + 1 :].sum()))


def coarse_range(counts: NDArray[np.int64], wanted: int) -> ThresholdRange:
    """Return the range in which the ``wanted``-th highest score lies, from the sum of the coarse counts.

    Args:
        counts: [65536], sums of what coarse_counts returned.
        wanted: at least 1.
    """
    place = _place(counts, wanted)
    if place < 0:
        return EVERYTHING
    upper = _upper(place)
    ends = np.array([upper << 16, upper << 16 | 0xFFFF], np.uint32).view(np.float32)
    return ThresholdRange(ends.min(), ends.max()) if np.isfinite(ends).all() else EVERYTHING


def _place(counts: NDArray[np.int64], wanted: int) -> int:
    """Place among the coarse counts of the ``wanted``-th highest score; negative where there are not so many."""
    return len(counts) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), wanted))


def _upper(place: int) -> int:
    """Upper half of the bits of the scores that are counted at a place."""
    return place - 0x8000 if place >= 0x8000 else 0xFFFF - place
