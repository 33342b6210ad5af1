"""Deltas that are thinned or shrunk and not selected: computed in float32, rounded once.

``w`` and ``d`` are flat float32 arrays [n] of base weights and deltas, p the density. Each function takes d, p, the
length of a row and a source of random numbers, and returns the factor f [n] of every delta (0 where the base stays, bit
for bit); the result is ``w + f d``.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fisherkit.floats import Floats
from fisherkit.kernels.prune_scores import Draw

MAGPRUNE_WINDOW = 0.3
"""Width of the range of keep probabilities, at most; it shrinks near densities of 0 and 1."""


def wise_ft(d: Floats, density: float, columns: int, draw: Draw) -> Floats:
    """Return f = p everywhere: ``(1 - p) base + p tuned`` (Wise-FT, arXiv 2109.01903)."""
    return np.full(d.shape, density, np.float32)


def dare(d: Floats, density: float, columns: int, draw: Draw) -> Floats:
    """Return f = 1/p with probability p, else 0 (DARE, arXiv 2311.03099, drop rate 1 - p)."""
    draws = np.empty(d.shape, np.float32)
    draw(draws)
    return np.where(draws < density, np.float32(1 / density if density else 0), np.float32(0))


def della(d: Floats, density: float, columns: int, draw: Draw) -> Floats:
    """Return f = 1/p_i with probability p_i, else 0 (DELLA, arXiv 2406.11617); p_i grows with the rank of |d_i|.

    MAGPRUNE, its first step: in a row of n entries the one of rank r (0 the smallest) is kept with probability
    ``p - e/2 + e (r + 1/2) / n``, whose mean is p; ``e = min(0.3, p, 1 - p)``. Ties are ranked by index.
    """
    window = min(MAGPRUNE_WINDOW, density, 1 - density)
    rows = np.abs(d).reshape(-1, columns)
    ranks = np.empty(rows.shape, np.float32)
    np.put_along_axis(
        ranks, np.argsort(rows, axis=1, kind="stable"), np.arange(columns, dtype=np.float32)[None], axis=1
    )
    chance = np.float32(density - window / 2) + np.float32(window / columns) * (ranks.reshape(-1) + np.float32(0.5))
    draws = np.empty(d.shape, np.float32)
    draw(draws)
    kept = draws < chance
    factors = np.zeros(d.shape, np.float32)
    np.divide(np.float32(1), chance, out=factors, where=kept)
    return factors


FACTORS: Mapping[str, Callable[[Floats, float, int, Draw], Floats]] = {"wise-ft": wise_ft, "dare": dare, "della": della}
"""Functions by metric."""
