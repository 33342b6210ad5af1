"""One tensor's deltas, of one fine-tune or several, replaced by a delta that is computed from them, rows at a time.

The result is ``w + s d'`` with d' float64, rounded once; where that is the base's value, the base's bits stay.

Axes: A rows and B columns of a matrix as it is stored, R rows of it, read along its outputs.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Stored, narrow, widen
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair

Doubles = NDArray[np.float64]
Change = Callable[[list[Doubles], slice], Doubles]
"""From the deltas of some rows [R, N], one per fine-tune, and which rows these are, to their new delta [R, N]."""
Others = Sequence[tuple[Stored, str] | None]
"""Flat entries of further fine-tunes with their safetensors code; None for one that leaves this tensor as it was."""

_ENTRIES = 1 << 22  # of a matrix, at a time


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a tensor as a matrix whose rows are runs of its last axis."""
    width = max(1, shape[-1]) if shape else 1
    return math.prod(shape) // width, width


def mean_of(weights: Sequence[float]) -> Change:
    """Return what makes the mean of some rows' deltas, each by its weight."""

    def mean(deltas: list[Doubles], rows: slice) -> Doubles:
        total: Doubles = np.average(deltas, axis=0, weights=weights)
        return total

    return mean


def change_rows(
    pair: TensorPair, others: Others, shape: tuple[int, int], *, input_axis: int, scale: float, change: Change
) -> DeltaCounts:
    """Overwrite the base's matrix with its changed rows.

    Args:
        pair: the matrix of BASE and the first fine-tune, flat.
        others: of further fine-tunes.
        shape: [A, B].
        input_axis: the axis that the inputs run along; rows are taken along the other one.
        scale: factor of the new delta.
        change: makes the new delta of some rows.

    Returns:
        Counts; ``energy`` is the mean of the fine-tunes' squared deltas.
    """
    views = [_along_outputs(flat, shape, input_axis) for flat in (pair.base, pair.tuned)]
    more = [None if one is None else (_along_outputs(one[0], shape, input_axis), one[1]) for one in others]
    counts = DeltaCounts()
    for rows in _row_blocks(views[0].shape):
        tuned = [(views[1][rows], pair.tuned_code), *(None if one is None else (one[0][rows], one[1]) for one in more)]
        counts += _change_block(views[0][rows], pair.base_code, tuned, rows, scale, change)
    return counts


def _change_block(
    base: Stored,
    code: str,
    tuned: Sequence[tuple[Stored, str] | None],
    rows: slice,
    scale: float,
    change: Change,
) -> DeltaCounts:
    w = widen(base, code).astype(np.float64)
    deltas, broken = [], np.zeros(w.shape, np.bool_)
    for one in tuned:
        with np.errstate(invalid="ignore"):
            deltas.append(np.zeros_like(w) if one is None else widen(*one) - w)
        broken |= ~np.isfinite(deltas[-1])
    if broken.any():
        for d in deltas:
            d[broken] = 0
    bad = int(np.count_nonzero(broken))
    zeros = int(np.count_nonzero(np.logical_and.reduce([d == 0 for d in deltas]))) - bad
    energy = sum(float(np.square(d).sum()) for d in deltas) / len(deltas)
    new = scale * change(deltas, rows)
    rounded = narrow((w + new).astype(np.float32), code)
    changed = (widen(rounded, code) != w) & ~broken  # not all: -0.0 + 0.0 is 0.0
    np.copyto(base, rounded, where=changed)
    kept = int(np.count_nonzero(changed))
    return DeltaCounts(
        kept=kept,
        zero_deltas=zeros,
        nonfinite=bad,
        rounded_away=max(0, int(np.count_nonzero(new)) - kept),
        energy=energy,
        energy_kept=float(np.square(new).sum()),
    )


def _along_outputs(flat: Stored, shape: tuple[int, int], input_axis: int) -> Stored:
    matrix = flat.reshape(shape)
    return matrix if input_axis == 1 else matrix.T


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _ENTRIES // max(shape[1], 1))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
