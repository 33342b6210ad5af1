"""Leading directions of an uncentered covariance C, positive semi-definite, given in full or as C ~ B B^T.

Axes: N channels, K directions. Tensors in, tensors out: no files, no state. Energy is of the trace: the share of the
mean square of what C is the covariance of.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherkit.kernels.range_finder import PRECISION
from fisherkit.kernels.subspace import effective_rank, energy_held, top_modes

_FIRST_RANK = 16


@dataclass(frozen=True)
class Directions:
    """Eigenvectors, largest eigenvalue first.

    Attributes:
        vectors: [N, K] float32, orthonormal columns.
        values: [K] float32, eigenvalues, descending.
        trace: of all of C.
    """

    vectors: Tensor
    values: Tensor
    trace: float

    @property
    def energy(self) -> float:
        """Share of the trace that these directions hold."""
        return energy_held(self.values.double().sqrt(), self.trace**0.5)

    @property
    def effective_rank(self) -> float:
        """Number of directions over which the trace spreads, at least; see kernels.subspace."""
        return effective_rank(self.values.double().sqrt(), self.trace**0.5)

    def first(self, count: int) -> "Directions":
        """Return the largest ``count`` of them, in memory of their own."""
        return Directions(self.vectors[:, :count].clone(), self.values[:count].clone(), self.trace)


def top_directions(covariance: Tensor, rank: int) -> Directions:
    """Return the ``rank`` largest directions of a full C [N, N]; fewer where the rest is float32's rounding.

    Args:
        covariance: C [N, N] of any real dtype, symmetric.
        rank: at least 1.

    Raises:
        CheckpointError: a value that is not finite.
    """
    modes = top_modes(covariance, rank)
    return Directions(modes.v, modes.s, float(covariance.diagonal().sum(dtype=torch.float64)))


def factor_directions(factor: Tensor, trace: float) -> Directions:
    """Return all directions of B [N, R], whose columns are orthogonal and descend in length; ``trace`` is that of C."""
    lengths = torch.linalg.vector_norm(factor, dim=0, dtype=torch.float64)
    real = int((lengths.square() > PRECISION * lengths[:1].square()).sum())
    vectors = factor[:, :real].double() / lengths[:real]
    return Directions(vectors.float(), lengths[:real].square().float(), trace)


def directions_for_energy(covariance: Tensor, energy: float) -> Directions:
    """Return the fewest directions of a full C [N, N] that hold a share of its trace, above 0 and at most 1.

    With 1, or where rounding hides the last of it, all that are more than rounding.

    Args:
        covariance: C [N, N] of any real dtype, symmetric.
        energy: the share.

    Raises:
        CheckpointError: a value that is not finite.
    """
    rank = _FIRST_RANK
    while True:
        found = top_directions(covariance, rank)
        enough = fewest(found, energy)
        if enough is not None:
            return enough
        if len(found.values) < rank:
            return found
        rank *= 2


def fewest(found: Directions, energy: float) -> Directions | None:
    """Return the fewest of these that hold a share of the trace; None if all of them do not."""
    held = found.values.double().cumsum(0)
    count = int((held < energy * found.trace).sum()) + 1
    return found.first(count) if energy < 1 and count <= len(held) else None
