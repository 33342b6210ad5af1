"""Density of |delta| against |W| on logarithmic axes, from samples of many tensors; fapm's figure is drawn from it.

Tensors differ in scale, so each is measured in its own units: x = |W| / mean|W|, and y = |d| / u with u its threshold's
size. In these units the threshold of a metric is one curve for all tensors. Entries with W = 0 or d = 0 are left out.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats
from fisherkit.kernels.prune_scores import Scratch, deltas
from fisherkit.kernels.tensor_pair import TensorPair

BINS = 96
LOW, HIGH = -8.0, 8.0
"""Ends of both axes, as powers of two; what lies beyond is put into the outermost bins."""


def unit(metric: str, mean: float, threshold: float | None) -> float | None:
    """Return u for a tensor, which makes the metric's threshold the same curve everywhere; None where there is none.

    Args:
        metric: of fapm.
        mean: mean of |W|.
        threshold: the lowest score that was kept; None if nothing was.
    """
    if not threshold or not math.isfinite(threshold) or metric not in ("fapm", "magnitude", "relative"):
        return None
    return abs(threshold) * (mean if metric == "relative" else 1.0)


def threshold_curve(metric: str, *, positive: bool) -> list[tuple[float, float]]:
    """Return points (x, y) of the threshold, which lies above or below zero; empty for metrics without one.

    ``fapm``: ``y (1 - 1/x) = 1`` (or -1); ``magnitude``: ``y = 1``; ``relative``: ``y = x``.
    """
    xs = [2 ** (LOW + (HIGH - LOW) * step / 400) for step in range(401)]
    if metric == "magnitude":
        return [(x, 1.0) for x in xs]
    if metric == "relative":
        return [(x, x) for x in xs]
    if metric != "fapm":
        return []
    points = [(x, (1.0 if positive else -1.0) / (1 - 1 / x)) for x in xs if x != 1]
    return [(x, y) for x, y in points if y > 0]


@dataclass
class DensityMap:
    """Counts per cell [y, x], of all entries and of those kept; samples are scaled up to their tensors.

    Attributes:
        metric: the one whose threshold is drawn.
        entries: all entries.
        kept: those that were kept.
        positive: tensors whose threshold lies above zero.
        negative: tensors whose threshold lies below.
    """

    metric: str = "fapm"
    entries: NDArray[np.float64] = field(default_factory=lambda: np.zeros((BINS, BINS)))
    kept: NDArray[np.float64] = field(default_factory=lambda: np.zeros((BINS, BINS)))
    positive: int = 0
    negative: int = 0

    def add(self, sample: TensorPair, count: int, threshold: float | None, scores: Floats | None) -> None:
        """Add a tensor by a sample of it.

        Args:
            sample: some of its entries, spread evenly.
            count: entries of the whole tensor.
            threshold: the lowest score that was kept; None if nothing was.
            scores: [n] float32 of the sample; None for metrics without scores.
        """
        size = sample.base.size
        w, d = deltas(sample.base, sample.base_code, sample.tuned, sample.tuned_code, Scratch(size))
        x, y = np.abs(w).astype(np.float64), np.abs(d).astype(np.float64)
        placed = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
        if not placed.any():
            return
        size_of = unit(sample.metric, sample.mean, threshold) or float(y[placed].mean())
        if threshold is not None:
            self.positive += threshold > 0
            self.negative += threshold < 0
        cells = _bins(y[placed] / size_of) * BINS + _bins(x[placed] / max(sample.mean, 1e-300))
        weight = count / size
        self.entries += weight * np.bincount(cells, minlength=BINS * BINS).reshape(BINS, BINS)
        if scores is not None and threshold is not None:
            kept = scores[placed] >= threshold
            self.kept += weight * np.bincount(cells[kept], minlength=BINS * BINS).reshape(BINS, BINS)


def _bins(values: NDArray[np.float64]) -> NDArray[np.int64]:
    steps = (np.log2(values) - LOW) * (BINS / (HIGH - LOW))
    return np.clip(steps, 0, BINS - 1).astype(np.int64)
