"""Leading singular modes of large matrices.

Axes: O outputs, I inputs, K modes, L columns of a sketch. Matrices are M[O,I] ~ U[O,K] diag(s) V[I,K]^T. Tensors in,
tensors out: no files, no state.

Small matrices are decomposed exactly, large ones by a sketch (see kernels.range_finder).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherkit.errors import OptionError
from fisherkit.kernels.range_finder import Decomposed, RowBlocks, ScaledMatrix

ITERATIONS = 8
OVERSAMPLE = 16
_FIRST_RANK = 16


@dataclass(frozen=True)
class Modes:
    """Singular modes of a matrix [O, I], largest first.

    Attributes:
        u: [O, K] float32, orthonormal columns; in each the entry of largest magnitude is positive.
        s: [K] float32, descending.
        v: [I, K] float32, orthonormal columns, with the signs that belong to ``u``.
        frobenius: root of the sum of squares of *all* entries of the matrix.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    frobenius: float

    @property
    def energy(self) -> float:
        """Share of the matrix's sum of squares that these modes hold; see energy_held."""
        return energy_held(self.s, self.frobenius)

    @property
    def effective_rank(self) -> float:
        """Number of modes over which the matrix spreads, at least; see effective_rank."""
        return effective_rank(self.s, self.frobenius)

    def first(self, count: int) -> "Modes":
        """Return the largest ``count`` of them, in memory of their own."""
        return replace(self, u=self.u[:, :count].clone(), s=self.s[:count].clone(), v=self.v[:, :count].clone())


def top_modes(
    matrix: Tensor | RowBlocks,
    rank: int,
    *,
    iterations: int = ITERATIONS,
    oversample: int = OVERSAMPLE,
    generator: torch.Generator | None = None,
) -> Modes:
    """Return the ``rank`` largest singular modes.

    Only modes above PRECISION times the largest singular value are returned, so a matrix of lower rank has fewer, and
    one of zeros none: any further direction would be arbitrary. Where singular values are equal any basis of their
    space is right; the start decides which one comes out. A matrix too small for a sketch to pay, its smaller side at
    most (rank + oversample) (iterations + 1), is decomposed exactly, from a float64 copy.

    Args:
        matrix: [O, I] of any real dtype.
        rank: how many modes; above min(O, I) means all of them.
        iterations: power iterations at most, of two passes over the matrix each; fewer once the modes stand still,
            which they do not where the spectrum has no gap at ``rank``.
        oversample: columns of the sketch beyond ``rank``.
        generator: of the random start, on the CPU; the same start every time if None.

    Raises:
        OptionError: a rank below 1, iterations or oversample below 0.
        CheckpointError: the matrix holds a value that is not finite in float32; the message says in which row.
    """
    _check(rank=(rank, 1), iterations=(iterations, 0), oversample=(oversample, 0))
    scaled = ScaledMatrix.of(matrix)
    return _modes(scaled, scaled.modes(rank, iterations, oversample, generator))


def modes_for_energy(
    matrix: Tensor | RowBlocks,
    energy: float,
    *,
    iterations: int = ITERATIONS,
    oversample: int = OVERSAMPLE,
    generator: torch.Generator | None = None,
) -> Modes:
    """Return the fewest modes whose squared singular values reach a share of the matrix's sum of squares.

    The rank of the sketch is doubled until they do, so the last sketch costs as much as all before. A sketch's singular
    values are never too large: where the spectrum is too flat for it there may be a mode too many, never one too few.

    Args:
        matrix: [O, I] of any real dtype.
        energy: above 0 and at most 1; 1 asks for all modes above PRECISION times the largest singular value.
        iterations: as for top_modes.
        oversample: as for top_modes.
        generator: as for top_modes.

    Raises:
        OptionError: energy is not in that range, iterations or oversample below 0.
        CheckpointError: as for top_modes.
    """
    if not 0 < energy <= 1:
        raise OptionError(f"energy must be above 0 and at most 1, not {energy}")
    _check(iterations=(iterations, 0), oversample=(oversample, 0))
    scaled, rank = ScaledMatrix.of(matrix), _FIRST_RANK
    while True:
        modes = _modes(scaled, scaled.modes(rank, iterations, oversample, generator))
        held = modes.s.double().square().cumsum(0)
        count = int((held < energy * scaled.frobenius**2).sum()) + 1
        # Sums are rounded: all of the energy may seem to be reached before the last mode, or never.
        if energy < 1 and count <= len(modes.s):
            return modes.first(count)
        if len(modes.s) < rank:
            return modes
        rank *= 2


def _modes(scaled: ScaledMatrix, found: Decomposed) -> Modes:
    """Modes of the matrix itself, with signs that do not depend on the sketch."""
    u, s, v = found
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign() if len(u) else 1.0
    return Modes(u * signs, (s.double() * 2.0**-scaled.exponent).float(), v * signs, scaled.frobenius)


def energy_held(s: Tensor, frobenius: float) -> float:
    """Return the share sum s^2 / frobenius^2, at most 1; 1.0 for a matrix of zeros, which has nothing to hold.

    Args:
        s: [K] singular values.
        frobenius: root of the sum of squares of the whole matrix.
    """
    return min(1.0, float((s.double() / frobenius).square().sum())) if frobenius else 1.0


def effective_rank(s: Tensor, frobenius: float) -> float:
    """Return the exponential of the Shannon entropy of p = s^2 / frobenius^2 (Roy, Vetterli 2007): from 1 to the rank.

    What the given modes do not hold counts as held by more modes of the size of the smallest given one. The true ones
    are no larger, so this is a lower bound: exact when all modes are given, and the closer the more they hold.

    Args:
        s: [K] the largest singular values, descending.
        frobenius: root of the sum of squares of the whole matrix.

    Returns:
        0.0 for a matrix of zeros or without any singular value.
    """
    if not frobenius or not len(s):
        return 0.0
    shares = (s.double() / frobenius).square()
    tail = max(0.0, 1.0 - float(shares.sum()))
    entropy = -torch.special.xlogy(shares, shares).sum() - tail * shares[shares > 0].min().log()
    return math.exp(float(entropy))


def _check(**options: tuple[int, int]) -> None:
    for option, (value, least) in options.items():
        if value < least:
            raise OptionError(f"{option} must be at least {least}, not {value}")
