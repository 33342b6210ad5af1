"""Randomized range finder with power iterations: the leading modes of a matrix from a few passes over it.

Axes: O outputs, I inputs, K modes, L columns of a sketch. Matrices are M[O,I] ~ U[O,K] diag(s) V[I,K]^T. Tensors in,
tensors out: no files, no state.

Every iterate is kept, not only the last (Halko, Martinsson, Tropp 2011, arXiv 0909.4061; Halko, Martinsson, Shkolnisky,
Tygert 2011, arXiv 1007.5510; Musco, Musco 2015): the same passes over the matrix, but neighbouring singular values
within 10 % of each other take four to eight iterations instead of dozens. Products are float32 and orthogonalised
twice, small matrices are float64, so modes are as good as a float32 decomposition's. The matrix is never copied to
float32 as a whole: products are taken a few rows at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherkit.errors import CheckpointError

# A mode below this share of the largest singular value is rounding: its direction means nothing in float32.
PRECISION = 2.0**-20
# What is below float32's rounding of the whole matrix is no new direction for a sketch.
_NOISE = 2.0**-24
# Iterations end when no more than this of the modes lies in the newest directions. The next iteration would bring ten
# times less, so the angles that are left are well below it.
_CONVERGED = 5e-3
# Entries at a time: a float32 block stays in a CPU's cache; an accelerator wants few launches.
_BLOCK = 1 << 20
_BLOCK_ON_DEVICE = 1 << 26
_CPU = torch.device("cpu")

Decomposed = tuple[Tensor, Tensor, Tensor]
"""Left modes [O, K], singular values [K] and right modes [I, K], largest first, float32."""


@dataclass(frozen=True)
class RowBlocks:
    """A matrix that is made or read some rows at a time.

    A pass asks for all rows in order; there are up to 19 passes.

    Attributes:
        shape: (O, I).
        rows: ``rows(start, stop)`` gives the rows of that range, [stop - start, I], of any real dtype.
        device: where the rows are.
        entries: how many are made or read at a time, in whole rows; None for what is fast on the device.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]
    device: torch.device = _CPU
    entries: int | None = None

    @classmethod
    def of(cls, matrix: "Tensor | RowBlocks") -> "RowBlocks":
        """Return a matrix in memory [O, I], of any real dtype, as row blocks."""
        if isinstance(matrix, RowBlocks):
            return matrix
        height, width = matrix.shape
        return cls((height, width), lambda start, stop: matrix[start:stop], matrix.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield ranges of rows, with these rows in float32."""
        height, width = self.shape
        entries = self.entries or (_BLOCK if self.device.type == "cpu" else _BLOCK_ON_DEVICE)
        step = max(1, entries // max(1, width))
        for start in range(0, height, step):
            stop = min(start + step, height)
            yield slice(start, stop), self.rows(start, stop).float()


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix times 2^exponent, of norm 0.5 to 1: no product leaves float32, be its entries a Fisher's or huge.

    Attributes:
        blocks: the matrix [O, I], not scaled.
        frobenius: root of the sum of squares of its entries.
    """

    blocks: RowBlocks
    frobenius: float

    @classmethod
    def of(cls, matrix: Tensor | RowBlocks) -> "ScaledMatrix":
        """Take the norm of a matrix [O, I].

        Raises:
            CheckpointError: it holds a value that is not finite in float32; the message says in which row.
        """
        blocks = RowBlocks.of(matrix)
        return cls(blocks, _frobenius(blocks))

    @property
    def exponent(self) -> int:
        """Exponent of the scale; a power of two changes no digit."""
        return -math.frexp(self.frobenius)[1]

    @property
    def _before(self) -> int:
        """Exponent that the thin factor of a product takes: as much as its entries, up to 1, and the sum bear."""
        return min(120, max(-60, self.exponent))

    @property
    def _after(self) -> int:
        """Exponent that the product takes: the rest."""
        return self.exponent - self._before

    def modes(self, rank: int, iterations: int, oversample: int, generator: torch.Generator | None) -> Decomposed:
        """Return the largest modes above PRECISION, at most ``rank``; arguments as for subspace.top_modes."""
        height, length = self.blocks.shape
        width = rank + oversample
        if not self.frobenius:
            none = [torch.zeros(*shape, 0, device=self.blocks.device) for shape in ((height,), (), (length,))]
            return none[0], none[1], none[2]
        if width * (iterations + 1) >= min(height, length):
            return self._all_modes(rank)
        return self._sketched_modes(rank, iterations, width, generator or torch.Generator().manual_seed(0))

    def _all_modes(self, rank: int) -> Decomposed:
        dense = torch.cat([block.double() for _, block in self.blocks]) * 2.0**self.exponent
        tall = dense.shape[0] >= dense.shape[1]
        a, s, b = _small_modes(dense if tall else dense.mT, rank)
        return (b, s, a) if tall else (a, s, b)

    def _sketched_modes(self, rank: int, iterations: int, width: int, generator: torch.Generator) -> Decomposed:
        """Modes within the span of all iterates, M ~ left core^T right^T with core = right^T M^T left."""
        (height, length), device = self.blocks.shape, self.blocks.device
        capacity = width * (iterations + 1)
        left, right = _OrthonormalBasis(height, capacity, device), _OrthonormalBasis(length, capacity + width, device)
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
            if float(b[older:].norm()) <= _CONVERGED:
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


class _OrthonormalBasis:
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


def _small_modes(core: Tensor, rank: int) -> Decomposed:
    """Modes of core ~ b diag(s) a^T for a float64 core [R, L], R >= L, in float32: a [L, K], s [K], b [R, K].

    Squaring the core costs half of float64's digits, which leaves more than float32 has, and half the time.
    """
    values, vectors = torch.linalg.eigh(core.mT @ core)
    a = vectors.flip(1)[:, : min(rank, _count_real(values.flip(0).clamp(min=0).sqrt()))]
    b, r = torch.linalg.qr(core @ a)
    s = r.diagonal()
    return a.float(), s.abs().cummin(0).values.float(), (b * s.sign()).float()


def _count_real(s: Tensor) -> int:
    """Count the descending singular values that are more than rounding."""
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
