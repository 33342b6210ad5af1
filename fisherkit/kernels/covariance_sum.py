"""Weighted sums of covariances, whole or as factors. Arrays in, arrays out; float64.

Axes: C channels, K columns of a factor B with E ~ B B^T.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats

Doubles = NDArray[np.float64]


def sum_of_wholes(weights: Sequence[float], covariances: Sequence[Floats]) -> Doubles:
    """Return sum_k w_k E_k of covariances, or of their triangles, of any one shape."""
    total = np.zeros(covariances[0].shape)
    for weight, covariance in zip(weights, covariances, strict=True):
        total += weight * covariance.astype(np.float64)
    return total


def sum_of_factors(weights: Sequence[float], factors: Sequence[Floats]) -> Doubles:
    """Return the best factor [C, K] of sum_k w_k B_k B_k^T; columns orthogonal, the longest first.

    The sum is A A^T with A = [sqrt(w_1) B_1, sqrt(w_2) B_2, ...]; its best factor of rank K is A V with V the K leading
    eigenvectors of A^T A. Two are folded into one at a time, so that A has 2 K columns however many there are.

    Args:
        weights: w_k, not negative.
        factors: B_k [C, K], all of the same shape.
    """
    rank = factors[0].shape[1]
    total: Doubles = np.sqrt(weights[0]) * factors[0].astype(np.float64)
    for weight, factor in zip(weights[1:], factors[1:], strict=True):
        joined = np.concatenate([total, np.sqrt(weight) * factor.astype(np.float64)], axis=1)
        _, vectors = np.linalg.eigh(joined.T @ joined)
        total = joined @ vectors[:, ::-1][:, :rank]
    return total
