"""Uncentered covariances C = sum_t x_t x_t^T of rows, in full, or as a sketch where they are too large for that.

Axes: R rows (tokens), C channels, K columns of a sketch. Tensors in, tensors out: no files, no state. Products and sums
are float32 whatever the rows are: a product of two bfloat16 or float16 numbers is exact then.

The sketch is Y = C S with fixed random signs S [C, K]. It is linear in C, so neither the order of the rows nor how they
were batched matters, and C ~ Y (S^T Y)^+ Y^T (Nystroem's approximation, in the form for one pass over the data of
Tropp, Yurtsever, Udell, Cevher 2017, arXiv 1706.05736). It is never larger than C. Its leading half of directions is
good, the last ones are vague, and what lies below some 1e-5 of the largest eigenvalue is float32's rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SKETCH_ABOVE = 4096
"""Channels above which a covariance is sketched: from four times SKETCH_RANK on a sketch takes fewer products."""
SKETCH_RANK = 1024

# C is symmetric, so blocks below the diagonal are not computed; those on it are taken whole from this size down.
_LEAF = {"cpu": 128}
_DEVICE_LEAF = 2048
_COPY_ROWS = 512
_DROPPED_BITS = 13  # of a float32, that TF32 leaves out


def sketch_rank(size: int, rank: int | None = None) -> int | None:
    """Return the columns of the sketch that a covariance is added up in; None where that is done in full.

    Args:
        size: channels.
        rank: columns that its factor is to have, which are good if the sketch has twice as many; None where all of a
            covariance is kept that need not be sketched.
    """
    if rank is None:
        return SKETCH_RANK if size > SKETCH_ABOVE else None
    columns = max(SKETCH_RANK, 2 * rank)
    return columns if 2 * columns <= size else None


def add_second_moment_(covariance: Tensor, rows: Tensor) -> None:
    """covariance[C,C] += rows^T rows, on and above the diagonal; ``complete_`` makes up the rest.

    Args:
        covariance: [C, C] float32, changed in place.
        rows: [R, C] of any float dtype.
    """
    with _fast_if_exact(rows):
        _add_upper_(covariance, rows.float())


def _add_upper_(covariance: Tensor, rows: Tensor) -> None:
    size = covariance.shape[0]
    if size <= _LEAF.get(covariance.device.type, _DEVICE_LEAF):
        covariance.addmm_(rows.mT, rows)
        return
    half = size // 2
    covariance[:half, half:].addmm_(rows[:, :half].mT, rows[:, half:])
    _add_upper_(covariance[:half, :half], rows[:, :half])
    _add_upper_(covariance[half:, half:], rows[:, half:])


def complete_(covariance: Tensor) -> Tensor:
    """Copy what lies above the diagonal below it, where add_second_moment_ left it out; returns the same tensor."""
    for start in range(0, covariance.shape[0], _COPY_ROWS):
        stop = min(start + _COPY_ROWS, covariance.shape[0])
        square = covariance[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).mT)
        covariance[stop:, start:stop] = covariance[start:stop, stop:].mT
    return covariance


def random_signs(size: int, rank: int, device: torch.device) -> Tensor:
    """Return S [size, rank] of +1 and -1, float32; the same for the same sizes, on every device.

    Args:
        size: channels.
        rank: columns of the sketch.
        device: where they are put; they are drawn on the CPU.
    """
    generator = torch.Generator().manual_seed(size)
    coins = torch.randint(0, 2, (size, rank), generator=generator, dtype=torch.int8)
    return coins.to(device, torch.float32).mul_(2).sub_(1)


def add_sketch_(sketch: Tensor, rows: Tensor, signs: Tensor) -> None:
    """sketch[C,K] += rows^T (rows signs).

    Args:
        sketch: [C, K] float32, changed in place.
        rows: [R, C] of any float dtype.
        signs: [C, K] from random_signs.
    """
    wide = rows.float()
    with _fast_if_exact(rows) as fast:
        mixed = wide @ signs
        if fast:  # the second factor has more digits than TF32: its leading ones, and then the others
            leading = leading_digits(mixed)
            sketch.addmm_(wide.mT, leading)
            mixed -= leading
        sketch.addmm_(wide.mT, mixed)


def leading_digits(values: Tensor) -> Tensor:
    """Return float32 values without the digits that TF32 leaves out.

    What is left out fits TF32 as well, but for the last two bits.
    """
    return (values.view(torch.int32) >> _DROPPED_BITS << _DROPPED_BITS).view(torch.float32)


def factor_of(sketch: Tensor, signs: Tensor) -> Tensor:
    """Return B [C, K] float32 with C ~ B B^T from its sketch: orthogonal columns, longest first, zeros at the end.

    A column's direction is an eigenvector of the approximation and its squared length the eigenvalue.

    Args:
        sketch: Y = C S [C, K] float32.
        signs: S [C, K] from random_signs.
    """
    y, s = sketch.double(), signs.double()
    shift = torch.finfo(torch.float32).eps * float(torch.linalg.vector_norm(y))
    if not shift:
        return torch.zeros_like(sketch)
    while True:  # rounding may leave S^T Y indefinite; the shift is taken off the eigenvalues again
        shifted = y + shift * s
        inner = s.mT @ shifted
        lower, failed = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
        if not failed:
            break
        shift *= 10
    root = torch.linalg.solve_triangular(lower.mT, shifted, upper=True, left=False)
    values, turn = torch.linalg.eigh(root.mT @ root)
    values, turn = values.flip(0).clamp_(min=torch.finfo(torch.float64).tiny), turn.flip(1)
    scale = ((values - shift).clamp(min=0) / values).sqrt()
    factor: Tensor = (root @ turn) * scale
    return factor.float()


def leading_factor(covariance: Tensor, rank: int) -> Tensor:
    """Return B [C, K] float32, the best of its rank with C ~ B B^T, of a whole C [C, C]; columns as of factor_of."""
    values, vectors = torch.linalg.eigh(covariance.double())
    factor: Tensor = vectors.flip(1)[:, :rank] * values.flip(0)[:rank].clamp(min=0).sqrt()
    return factor.float()


def packed(covariance: Tensor) -> Tensor:
    """Return the upper triangle of C [C, C], diagonal included, row after row: [C (C + 1) / 2]."""
    return torch.cat([covariance[row, row:] for row in range(len(covariance))])


@contextmanager
def _fast_if_exact(rows: Tensor) -> Iterator[bool]:
    """Products of 16-bit numbers on CUDA may take the TF32 units, whose inputs hold all of their digits."""
    fast = rows.device.type == "cuda" and rows.dtype in (torch.bfloat16, torch.float16)
    before = torch.get_float32_matmul_precision()
    if fast:
        torch.set_float32_matmul_precision("high")
    try:
        yield fast
    finally:
        if fast:
            torch.set_float32_matmul_precision(before)
