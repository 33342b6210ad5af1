"""Leading singular modes of large matrices, and what is left of an update outside of them.

Axes: O outputs, I inputs, K modes, L columns of a sketch. Matrices are M[O,I] ~ U[O,K] diag(s) V[I,K]^T. Tensors in,
tensors out: no files, no state.

The sketch is the randomized range finder with power iterations (Halko, Martinsson, Tropp 2011, arXiv 0909.4061) that
keeps every iterate, not only the last (Halko, Martinsson, Shkolnisky, Tygert 2011, arXiv 1007.5510; Musco, Musco 2015):
the same passes over the matrix, but neighbouring singular values within 10 % of each other take four to eight
iterations instead of dozens. Products are float32 and orthogonalised twice, small matrices are float64, so modes are
as good as a float32 decomposition's. The matrix is never copied to float32 as a whole: products are taken a few rows
at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fisherkit.errors import CheckpointError, OptionError

Side = Literal["both", "left", "right"]

ITERATIONS = 8
OVERSAMPLE = 16
# A mode below this share of the largest singular value is rounding: its direction means nothing in float32.
PRECISION = 2.0**-20
# What is below float32's rounding of the whole matrix is no new direction for a sketch.
_NOISE = 2.0**-24
# Iterations end when no more than this of the modes lies in the newest directions. The next iteration would bring ten
# times less, so the angles that are left are well below it.
_SETTLED = 5e-3
_FIRST_RANK = 16
# Entries at a time: a float32 block stays in a CPU's cache; an accelerator wants few launches.
_BLOCK = 1 << 20
_BLOCK_ON_DEVICE = 1 << 26
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RowBlocks:
    """A matrix that is made or read some rows at a time. A pass asks for all rows in order; there are up to 19 passes.

    Attributes:
        shape: (O, I).
        rows: ``rows(start, stop)`` gives the rows of that range, [stop - start, I], of any real dtype.
        device: where the rows are.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]
    device: torch.device = _CPU

    @classmethod
    def of(cls, matrix: "Tensor | RowBlocks") -> "RowBlocks":
        """A matrix in memory, of any real dtype, as row blocks."""
        if isinstance(matrix, RowBlocks):
            return matrix
        height, width = matrix.shape
        return cls((height, width), lambda start, stop: matrix[start:stop], matrix.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of rows, with these rows in float32."""
        height, width = self.shape
        entries = _BLOCK if self.device.type == "cpu" else _BLOCK_ON_DEVICE
        step = max(1, entries // max(1, width))
        for start in range(0, height, step):
            stop = min(start + step, height)
            yield slice(start, stop), self.rows(start, stop).float()


@dataclass(frozen=True)
class Modes:
    """Singular modes of a matrix, largest first.

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
        """The share of the matrix's sum of squares that these modes hold; see energy_held."""
        return energy_held(self.s, self.frobenius)

    @property
    def effective_rank(self) -> float:
        """Over how many modes the matrix spreads, at least; see effective_rank."""
        return effective_rank(self.s, self.frobenius)

    def first(self, count: int) -> "Modes":
        """The largest ``count`` of them, in memory of their own."""
        return replace(self, u=self.u[:, :count].clone(), s=self.s[:count].clone(), v=self.v[:, :count].clone())


def top_modes(
    matrix: Tensor | RowBlocks,
    rank: int,
    *,
    iterations: int = ITERATIONS,
    oversample: int = OVERSAMPLE,
    generator: torch.Generator | None = None,
) -> Modes:
    """The ``rank`` largest singular modes.

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
    return _Source(matrix).modes(rank, iterations, oversample, generator)


def modes_for_energy(
    matrix: Tensor | RowBlocks,
    energy: float,
    *,
    iterations: int = ITERATIONS,
    oversample: int = OVERSAMPLE,
    generator: torch.Generator | None = None,
) -> Modes:
    """The fewest modes whose squared singular values reach a share of the matrix's sum of squares.

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
    source, rank = _Source(matrix), _FIRST_RANK
    while True:
        modes = source.modes(rank, iterations, oversample, generator)
        held = modes.s.double().square().cumsum(0)
        count = int((held < energy * source.frobenius**2).sum()) + 1
        # Sums are rounded: all of the energy may seem to be reached before the last mode, or never.
        if energy < 1 and count <= len(modes.s):
            return modes.first(count)
        if len(modes.s) < rank:
            return modes
        rank *= 2


def energy_held(s: Tensor, frobenius: float) -> float:
    """The share sum s^2 / frobenius^2, at most 1; 1.0 for a matrix of zeros, which has nothing to hold."""
    return min(1.0, float((s.double() / frobenius).square().sum())) if frobenius else 1.0


def effective_rank(s: Tensor, frobenius: float) -> float:
    """The exponential of the Shannon entropy of p = s^2 / frobenius^2 (Roy, Vetterli 2007): from 1 to the rank.

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


def project_out(delta: Tensor, u: Tensor, v: Tensor, side: Side = "both") -> Tensor:
    """The part of an update that lies outside of the modes: (1 - u u^T) delta, delta (1 - v v^T), or both.

    Args:
        delta: [O, I] of any real dtype; computed in float32.
        u: [O, K] orthonormal columns; not looked at when the side is ``right``.
        v: [I, K] orthonormal columns; not looked at when the side is ``left``.
        side: ``left`` takes away what writes to the outputs in u, ``right`` what reads from the inputs in v.

    Returns:
        A float32 tensor [O, I].

    Raises:
        OptionError: no such side.
    """
    if side not in ("both", "left", "right"):
        raise OptionError(f"side must be one of both, left, right, not {side!r}")
    kept = delta.float()
    if side != "right":
        u = u.float()
        kept = kept - u @ (u.mT @ kept)
    if side != "left":
        v = v.float()
        kept = kept - (kept @ v) @ v.mT
    return kept


def _check(**options: tuple[int, int]) -> None:
    for option, (value, least) in options.items():
        if value < least:
            raise OptionError(f"{option} must be at least {least}, not {value}")


class _Source:
    """A matrix, scaled to a norm of 0.5 to 1: no product leaves float32, be its entries a Fisher's or huge."""

    def __init__(self, matrix: Tensor | RowBlocks) -> None:
        self.blocks = RowBlocks.of(matrix)
        self.frobenius = _frobenius(self.blocks)
        # Powers of two change no digit. One goes on the thin factor of a product and is bounded by what its entries, up
        # to 1, and the sum bear; the product takes what is left of the other.
        exponent = -math.frexp(self.frobenius)[1]
        self._before = min(120, max(-60, exponent))
        self._after = exponent - self._before

    def modes(self, rank: int, iterations: int, oversample: int, generator: torch.Generator | None) -> Modes:
        """The largest modes above PRECISION, at most ``rank``."""
        height, length = self.blocks.shape
        width = rank + oversample
        if not self.frobenius:
            u, s, v = (torch.zeros(*shape, 0, device=self.blocks.device) for shape in ((height,), (), (length,)))
        elif width * (iterations + 1) >= min(height, length):
            u, s, v = self._all_modes(rank)
        else:
            u, s, v = self._sketched_modes(rank, iterations, width, generator or torch.Generator().manual_seed(0))
        signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign() if height else 1.0
        s = (s.double() * 2.0 ** -(self._before + self._after)).float()
        return Modes(u * signs, s, v * signs, self.frobenius)

    def _all_modes(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        dense = torch.cat([block.double() for _, block in self.blocks]) * 2.0 ** (self._before + self._after)
        tall = dense.shape[0] >= dense.shape[1]
        a, s, b = _small_modes(dense if tall else dense.mT, rank)
        return (b, s, a) if tall else (a, s, b)

    def _sketched_modes(
        self, rank: int, iterations: int, width: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Modes within the span of all iterates, M ~ left core^T right^T with core = right^T M^T left."""
        (height, length), device = self.blocks.shape, self.blocks.device
        capacity = width * (iterations + 1)
        left, right = _Basis(height, capacity, device), _Basis(length, capacity + width, device)
        core = torch.zeros(capacity + width, capacity, dtype=torch.float64, device=device)
        fresh = right.extend(torch.randn(length, width, generator=generator).to(device))
        for iteration in range(iterations + 1):
            image = self._transposed_times(left.extend(self._times(fresh)))
            older = right.count
            fresh = right.extend(image)
            core[: right.count, left.count - image.shape[1] : left.count] = right.columns.mT @ image
            # Small decompositions cost as much as passes: every other iteration looks whether it may stop.
            if iteration % 2 and iteration < iterations and fresh.shape[1]:
                continue
            a, s, b = _small_modes(core[: right.count, : left.count], rank)
            if float(b[older:].norm()) <= _SETTLED:
                break
        return left.columns @ a, s, right.columns @ b

    def _times(self, thin: Tensor) -> Tensor:
        """M thin, [O, L] for thin [I, L], scaled."""
        thin = thin * 2.0**self._before
        product = torch.empty(self.blocks.shape[0], thin.shape[1], device=thin.device)
        for span, block in self.blocks:
            torch.mm(block, thin, out=product[span])
        return product.mul_(2.0**self._after)

    def _transposed_times(self, thin: Tensor) -> Tensor:
        """M^T thin, [I, L] for thin [O, L], scaled."""
        thin = thin * 2.0**self._before
        product = torch.zeros(self.blocks.shape[1], thin.shape[1], device=thin.device)
        for span, block in self.blocks:
            product.addmm_(block.mT, thin[span])
        return product.mul_(2.0**self._after)


class _Basis:
    """Orthonormal columns [N, count] that grow, in memory that is touched only as they do."""

    def __init__(self, length: int, capacity: int, device: torch.device) -> None:
        self._memory = torch.empty(length, capacity, device=device)
        self.count = 0

    @property
    def columns(self) -> Tensor:
        return self._memory[:, : self.count]

    def extend(self, block: Tensor) -> Tensor:
        """Add what ``block`` [N, L] has outside of the span so far; returns the columns added, L at most.

        What is rounding only is dropped: at once, or when most of it, made unit length, turns out to lie in the span.
        """
        for least in (_NOISE, 0.5):  # twice is enough
            outside = (block - self.columns @ (self.columns.mT @ block)).double()
            squares, turn = torch.linalg.eigh(outside.mT @ outside)
            real = squares > least**2
            block = (outside @ (turn[:, real] / squares[real].sqrt())).float()
        self._memory[:, self.count : self.count + block.shape[1]] = block
        self.count += block.shape[1]
        return block


def _small_modes(core: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Modes of core ~ b diag(s) a^T for a float64 core [R, L], R >= L, in float32: a [L, K], s [K], b [R, K].

    Squaring the core costs half of float64's digits, which leaves more than float32 has, and half the time.
    """
    values, vectors = torch.linalg.eigh(core.mT @ core)
    a = vectors.flip(1)[:, : min(rank, _count_real(values.flip(0).clamp(min=0).sqrt()))]
    b, r = torch.linalg.qr(core @ a)
    s = r.diagonal()
    return a.float(), s.abs().cummin(0).values.float(), (b * s.sign()).float()


def _count_real(s: Tensor) -> int:
    """How many of the descending singular values are more than rounding."""
    return int((s > PRECISION * s[:1]).sum())


def _frobenius(blocks: RowBlocks) -> float:
    total = 0.0
    for span, block in blocks:
        norm = float(torch.linalg.vector_norm(block, dtype=torch.float64))
        if not math.isfinite(norm):
            row = int((~block.isfinite()).any(dim=1).nonzero()[0])
            raise CheckpointError(f"row {span.start + row} holds a value that is not finite")
        total += norm**2
    return math.sqrt(total)
