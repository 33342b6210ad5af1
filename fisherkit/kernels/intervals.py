"""Means over tokens with 95 % intervals over samples.

A sample has a total (nats of its tokens, say) and a size (their number). The mean of a set is the sum of all totals by
the sum of all sizes. It is a ratio of two sums, whose standard error is that of its residuals (Cochran, Sampling
Techniques, 3rd ed., 6.4): with e_n = total_n - mean * size_n,

    se = sqrt(N / (N - 1) * sum e_n^2) / sum size_n,

and the interval is mean +- t * se, t from Student's distribution with N - 1 degrees of freedom. With equal sizes it is
the usual interval of a mean. Samples are taken for independent of each other, tokens of a sample are not.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EXACT_UP_TO = 300  # degrees of freedom, up to which the distribution is summed term by term


def ratio_mean(totals: ArrayLike, sizes: ArrayLike) -> tuple[float, float | None]:
    """Return sum(totals) / sum(sizes), and half of the width of its 95 % interval; None for a single sample.

    Args:
        totals: [N] one per sample.
        sizes: [N] of the samples, above 0.
    """
    mean, influence = _influence(totals, sizes)
    return mean, _half_width(influence)


def ratio_difference(
    totals: ArrayLike, sizes: ArrayLike, first_totals: ArrayLike, first_sizes: ArrayLike
) -> tuple[float, float | None]:
    """Return how much the mean of one side is above that of the first, and half of the width of its 95 % interval.

    The two are paired by sample: what makes a sample hard for both drops out.

    Args:
        totals: [N] of one side.
        sizes: [N] of its samples.
        first_totals: [N] of the first side, sample by sample.
        first_sizes: [N] of its samples.
    """
    mean, influence = _influence(totals, sizes)
    first_mean, first_influence = _influence(first_totals, first_sizes)
    return mean - first_mean, _half_width(influence - first_influence)


def _influence(totals: ArrayLike, sizes: ArrayLike) -> tuple[float, NDArray[np.float64]]:
    """Return the mean, and e_n / sum size_n for each sample."""
    total, size = np.asarray(totals, np.float64), np.asarray(sizes, np.float64)
    mean = float(total.sum() / size.sum())
    return mean, (total - mean * size) / size.sum()


def _half_width(influence: NDArray[np.float64]) -> float | None:
    count = len(influence)
    if count < 2:
        return None
    return student(count - 1) * math.sqrt(count / (count - 1) * float(influence @ influence))


def share(hits: Sequence[bool]) -> tuple[float, float | None]:
    """Return the share of hits, and half of the width of its 95 % interval, as ratio_mean has it."""
    return ratio_mean(np.asarray(hits, np.float64), np.ones(len(hits)))


def student(degrees: int) -> float:
    """Return the 97.5 % point of Student's t distribution.

    Args:
        degrees: of freedom, 1 or more.
    """
    if degrees > _EXACT_UP_TO:  # Abramowitz & Stegun 26.7.5, of which the third term is below 1e-8 here
        z = 1.959963984540054
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low, high = 0.0, 13.0  # 12.706 for one degree of freedom
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _inside(t: float, degrees: int) -> float:
    """Return P(-t < T < t) for a whole number of degrees of freedom: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
