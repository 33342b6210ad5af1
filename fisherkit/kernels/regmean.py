"""A fine-tune's delta, solved for: what least disturbs both what a layer learnt and what it knew.

For a linear layer y = W x with deltas D_k = W_k - W_base, covariances C_k = E[x x^T] of the inputs of the k-th task and
C_o of the old ones, the delta D' that minimises

    sum_k w_k tr((D' - D_k) G_k (D' - D_k)^T) + lam tr(D' C_o D'^T),   G_k = C_k + mu_k I

is D' = (sum_k w_k D_k G_k) (G + lam C_o)^-1 with G = sum_k w_k G_k. It is RegMean (arXiv 2212.09849) of the base and
its fine-tunes, and the solve of MEMIT (arXiv 2210.07229). One decomposition serves every lam: with G = L L^T and
L^-1 C_o L^-T = V diag(theta) V^T,

    D' = (sum_k D_k R_k) diag(1 / (1 + lam theta)) B,   B = V^T L^-1,   R_k = w_k G_k B^T,

a Wiener filter over directions in which the old inputs have theta times the new ones' energy: B G B^T = I and
B C_o B^T = diag(theta), so the squares of the columns of sum_k D_k R_k are the delta's energies by direction.

A covariance that is held as C ~ B B^T + e I (e is what the factor leaves out, spread over all directions) is solved
within the span of the factors, exactly: outside of it all of them are multiples of I.

Axes: O outputs, N inputs (channels), M directions (N, or those of the span), K columns of a factor. All of it is
float64. Arrays in, arrays out: no files, no state, no torch.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fisherkit.errors import CheckpointError
from fisherkit.kernels.moment import Doubles, Moment

_LEAF = 64  # size below which a triangle is inverted as any matrix
_MOST_RAISES = 5


class Solution(NamedTuple):
    """Some rows of the solved delta.

    Attributes:
        delta: D' [R, N].
        energies: [M] of D's directions, in the order of Filter.spectrum.
    """

    delta: Doubles
    energies: Doubles


@dataclass(frozen=True)
class Filter:
    """Decomposition that solves for any lam; made by ``decompose``.

    Attributes:
        basis: [N, M] orthonormal; None for the channels themselves.
        inward: R_k [M, M] of each fine-tune.
        theta: [M] ratio of old to new energy by direction, ascending.
        outward: B [M, M].
        damping: mu of each fine-tune.
        shares: of each fine-tune's delta in what lies outside of the basis.
        outside_new: energy of G in each direction outside.
        outside_old: energy of C_o there.
    """

    basis: Doubles | None
    inward: tuple[Doubles, ...]
    theta: Doubles
    outward: Doubles
    damping: tuple[float, ...]
    shares: tuple[float, ...]
    outside_new: float
    outside_old: float

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        arrays = [*self.inward, self.theta, self.outward, *([self.basis] if self.basis is not None else [])]
        return sum(array.nbytes for array in arrays)

    @property
    def spectrum(self) -> Doubles:
        """Ratios of old to new energy: theta, and one for all that lies outside of the basis."""
        if self.basis is None:
            return self.theta
        return np.append(self.theta, self.outside_old / self.outside_new)

    def gains(self, old_weight: float) -> Doubles:
        """Return what is kept of a delta by direction, 1 / (1 + lam theta), in the order of ``spectrum``."""
        gains: Doubles = 1 / (1 + old_weight * self.spectrum)
        return gains

    def solve(self, deltas: Sequence[Doubles], old_weight: float) -> Solution:
        """Return rows of D' from the same rows [R, N] of every D_k.

        Args:
            deltas: of each fine-tune.
            old_weight: lam, not negative.
        """
        gains = self.gains(old_weight)
        if self.basis is None:
            z = _sum(delta @ inward for delta, inward in zip(deltas, self.inward, strict=True))
            return Solution((z * gains) @ self.outward, np.square(z).sum(axis=0))
        inside = [delta @ self.basis for delta in deltas]
        z = _sum(part @ inward for part, inward in zip(inside, self.inward, strict=True))
        mixed = _sum(share * delta for share, delta in zip(self.shares, deltas, strict=True))
        mixed_inside = _sum(share * part for share, part in zip(self.shares, inside, strict=True))
        outside = max(0.0, float(np.square(mixed).sum() - np.square(mixed_inside).sum()))
        moved = (z * gains[:-1]) @ self.outward - gains[-1] * mixed_inside
        energies = np.append(np.square(z).sum(axis=0), self.outside_new * outside)
        return Solution(gains[-1] * mixed + moved @ self.basis.T, energies)

    def weighed(self, deltas: Sequence[Doubles], old_weight: float) -> Doubles:
        """Return rows of D' (G + lam C_o)^1/2, up to a rotation: the sums of their squares are D's own energies there.

        Args:
            deltas: rows [R, N] of each fine-tune.
            old_weight: lam.

        Returns:
            [R, M], or [R, M + N] where there is a basis.
        """
        gains = self.gains(old_weight)
        inside = deltas if self.basis is None else [delta @ self.basis for delta in deltas]
        z = _sum(part @ inward for part, inward in zip(inside, self.inward, strict=True))
        if self.basis is None:
            z *= np.sqrt(gains)
            return z
        mixed = _sum(share * delta for share, delta in zip(self.shares, deltas, strict=True))
        outside = mixed - (mixed @ self.basis) @ self.basis.T
        return np.concatenate((z * np.sqrt(gains[:-1]), outside * np.sqrt(gains[-1] * self.outside_new)), axis=1)

    def unweighed(self, rows: Doubles, old_weight: float) -> Doubles:
        """Return rows [K, N] whose ``weighed`` form, of a solved delta, would be ``rows`` [K, M] or [K, M + N]."""
        gains, count = self.gains(old_weight), len(self.theta)
        inside: Doubles = (rows[:, :count] * np.sqrt(gains[:count])) @ self.outward
        if self.basis is None:
            return inside
        outside: Doubles = rows[:, count:] * np.sqrt(gains[-1] / self.outside_new)
        return outside + inside @ self.basis.T


def best_factors(rows: Doubles, rank: int) -> tuple[Doubles, Doubles, float]:
    """Return L [O, K] and R [K, M] with L R the best approximation of ``rows`` [O, M] of a rank, K at most.

    Both have columns, or rows, of the same lengths. The third is the share of the squares that it holds.
    """
    tall = rows.shape[0] >= rows.shape[1]
    values, vectors = np.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
    top, total = vectors[:, ::-1][:, :rank], float(np.maximum(values, 0).sum())
    left, right = (rows @ top, top.T) if tall else (top, top.T @ rows)
    lengths = np.linalg.norm(left, axis=0) if tall else np.linalg.norm(right, axis=1)
    real = lengths > 1e-12 * lengths.max(initial=0.0)
    roots = np.sqrt(lengths[real])
    left, right = left[:, real], right[real]
    balanced = (left / roots, right * roots[:, None]) if tall else (left * roots, right / roots[:, None])
    return *balanced, float(np.square(lengths).sum()) / total if total else 1.0


def decompose(news: Sequence[tuple[float, Moment]], old: Moment | None, damping: float) -> Filter:
    """Decompose the covariances of layers that read the same inputs.

    Args:
        news: weight w_k and covariance C_k of each fine-tune, all of the same size.
        old: C_o; None for the fine-tunes alone.
        damping: mu as a share of a covariance's mean energy by channel: what is known of directions in which no input
            lies. It keeps the solve regular where there are dead channels, or fewer tokens than channels.

    Raises:
        CheckpointError: values that no covariance has.
    """
    moments = [moment for _, moment in news]
    means = [moment.mean for moment in moments]
    spare = old.mean if old is not None and old.mean > 0 else 1.0  # nothing ever came in: then nothing changes
    mus = tuple(damping * (mean if mean > 0 else spare) for mean in means)
    basis = _span([*moments, *([old] if old is not None else [])])
    for _ in range(_MOST_RAISES):
        reduced = [weight * _raised(moment.within(basis), mu) for (weight, moment), mu in zip(news, mus, strict=True)]
        try:
            lower = np.asarray(np.linalg.cholesky(_sum(reduced)), np.float64)
            break
        except np.linalg.LinAlgError:  # rounding left a covariance indefinite by more than mu
            mus = tuple(10 * mu for mu in mus)
    else:
        raise CheckpointError("a covariance of the new inputs is far from positive semi-definite; extract it anew")
    inverse = lower_inverse(lower)
    theta, outward = np.zeros(len(lower)), inverse
    if old is not None:
        turned = inverse @ old.within(basis) @ inverse.T
        theta, vectors = np.linalg.eigh((turned + turned.T) / 2)
        theta, outward = np.maximum(theta, 0), vectors.T @ inverse
    outside = [weight * (moment.rest + mu) for (weight, moment), mu in zip(news, mus, strict=True)]
    return Filter(
        basis=basis,
        inward=tuple(one @ outward.T for one in reduced),
        theta=theta,
        outward=outward,
        damping=mus,
        shares=tuple(one / sum(outside) for one in outside),
        outside_new=sum(outside),
        outside_old=old.rest if old is not None else 0.0,
    )


def lower_inverse(lower: Doubles) -> Doubles:
    """Return the inverse of a lower triangle [N, N], by halves: [[A, 0], [C, B]]^-1 = [[A', 0], [-B' C A', B']]."""
    size = len(lower)
    if size <= _LEAF:
        return np.tril(np.linalg.inv(lower))
    half = size // 2
    first, last = lower_inverse(lower[:half, :half]), lower_inverse(lower[half:, half:])
    out = np.zeros_like(lower)
    out[:half, :half], out[half:, half:] = first, last
    out[half:, :half] = -last @ (lower[half:, :half] @ first)
    return out


def _span(moments: Sequence[Moment]) -> Doubles | None:
    """Return an orthonormal basis of all factors; None where one is given in full, or they span all channels."""
    if any(moment.factor is None for moment in moments):
        return None
    columns = np.concatenate([moment.factor for moment in moments if moment.factor is not None], axis=1)
    if columns.shape[1] >= columns.shape[0]:
        return None
    basis: Doubles = np.linalg.qr(columns).Q
    return basis


def _raised(matrix: Doubles, mu: float) -> Doubles:
    out = matrix.copy()
    out[np.diag_indices_from(out)] += mu
    return out


def _sum(parts: Iterable[Doubles]) -> Doubles:
    return functools.reduce(operator.add, parts)
