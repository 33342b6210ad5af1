"""One tensor's delta masked, kept out of directions and scaled, in this order, in memory.

The result is ``w + s P(mask * (f - w))``, computed in float32 and rounded once; w is the base, f the tuned tensor.
Where nothing but a mask acts, entries are selected instead, so that each is bit-identical to one of the two; where the
delta ends up zero, the base's bits stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fisherkit.floats import Floats, narrow, widen
from fisherkit.kernels.compiled import address, blend_loop
from fisherkit.kernels.llvm_loops import LANES
from fisherkit.kernels.prune import copy_flagged, sum_of_squares
from fisherkit.kernels.prune_scores import BLOCK, Flags, Scratch, deltas
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair
from fisherkit.pairs.parallel import BlockPool

_PRODUCT_ROWS = 1024  # rows of a matrix that are multiplied at a time


@dataclass(frozen=True)
class Treatment:
    """Operations on a delta of shape [..., a, b].

    Attributes:
        mask: bool, broadcastable to the tensor: True where it may change; None for everywhere.
        u: [..., a, k] float32 directions of the last axis but one that are removed; None for none.
        v: [..., b, k] float32 directions of the last axis that are removed; None for none.
        scale: factor at the end.
    """

    mask: Flags | None = None
    u: Floats | None = None
    v: Floats | None = None
    scale: float = 1.0

    @property
    def selects(self) -> bool:
        """True if nothing but a mask acts, so that every entry is one of the two as it is."""
        return self.scale == 1 and self.u is None and self.v is None


def blend(pair: TensorPair, shape: tuple[int, ...], treatment: Treatment, pool: BlockPool) -> DeltaCounts:
    """Overwrite the base's entries with the result.

    Args:
        pair: the tensor, flat.
        shape: its shape.
        treatment: what to do; its parts fit the shape.
        pool: threads.

    Returns:
        Counts, of which ``kept`` are the entries that differ from the base's after all.
    """
    width = max(1, shape[-1] if shape else 1)
    mask = None if treatment.mask is None else np.broadcast_to(treatment.mask, shape).reshape(-1, width)
    if treatment.u is not None or treatment.v is not None:
        return _project_all(pair, shape, mask, treatment)

    def one(start: int, stop: int) -> DeltaCounts:
        flags = None if mask is None else np.ascontiguousarray(mask[start:stop]).reshape(-1)
        return _blend_entries(pair.part(start * width, stop * width), flags, treatment.scale, pool.scratch)

    return sum(pool.map(one, pair.base.size // width, max(1, BLOCK // width)), DeltaCounts())


def _blend_entries(part: TensorPair, flags: Flags | None, scale: float, scratch: Scratch) -> DeltaCounts:
    is_same = part.tuned_code == part.base_code
    loop = blend_loop(part.base_code, masks=flags is not None, scales=scale != 1) if is_same else None
    if loop is None:
        return _blend_by_numpy(part, flags, scale, scratch)
    whole, size = part.base.size // LANES * LANES, part.base.size
    counts = _blend_vectors(loop, part.part(0, whole), flags, scale)
    if whole < size:
        counts += _blend_by_numpy(part.part(whole, size), None if flags is None else flags[whole:], scale, scratch)
    return counts


def _blend_vectors(loop: Callable[..., None], part: TensorPair, flags: Flags | None, scale: float) -> DeltaCounts:
    """Blend by a compiled loop; the size is a multiple of LANES, and there may be more flags."""
    counts, sums = np.empty(4, np.int64), np.empty(6, np.float64)
    mask = 0 if flags is None else address(flags)
    loop(address(part.base), address(part.tuned), part.base.size // LANES, scale, mask, address(counts), address(sums))
    kept, zeros, bad, with_delta = map(int, counts)
    return DeltaCounts(
        kept=kept,
        zero_deltas=zeros - bad,
        nonfinite=bad,
        rounded_away=with_delta - kept,
        energy=float(sums[4]),
        energy_kept=float(sums[5]),
    )


def _blend_by_numpy(part: TensorPair, flags: Flags | None, scale: float, scratch: Scratch) -> DeltaCounts:
    size = part.base.size
    own = scratch if size <= BLOCK else Scratch(size)  # a single row may be longer
    w, d = deltas(part.base, part.base_code, part.tuned, part.tuned_code, own)
    energy, bad = sum_of_squares(d), 0
    if not np.isfinite(energy):
        bad = _drop_nonfinite(d)
        energy = sum_of_squares(d)
    changed = own.flags[0][:size]
    zeros = int(np.count_nonzero(np.equal(d, 0, out=changed))) - bad
    if flags is not None:
        np.multiply(d, flags, out=d)
    if scale != 1:
        np.multiply(d, np.float32(scale), out=d)
        kept, lost = _add_rounded(part, w, d, own)
    else:
        copy_flagged(part, np.not_equal(d, 0, out=changed), own)
        kept, lost = int(np.count_nonzero(changed)), 0
    return DeltaCounts(
        kept=kept,
        zero_deltas=zeros,
        nonfinite=bad,
        rounded_away=lost,
        energy=energy,
        energy_kept=energy if flags is None and scale == 1 else sum_of_squares(d),
    )


def _project_all(pair: TensorPair, shape: tuple[int, ...], mask: Flags | None, treatment: Treatment) -> DeltaCounts:
    """``(I - U U^T) d (I - V V^T)``, matrix by matrix, of which the delta is held in float32."""
    a, b = shape[-2:]
    counts = DeltaCounts()
    for number in range(pair.base.size // max(a * b, 1)):
        part = pair.part(number * a * b, (number + 1) * a * b)
        rows = None if mask is None else mask[number * a : (number + 1) * a]
        u, v = _matrix_of(treatment.u, number), _matrix_of(treatment.v, number)
        counts += _project(part, (a, b), rows, u, v, treatment.scale)
    return counts


def _project(
    part: TensorPair, shape: tuple[int, int], mask: Flags | None, u: Floats | None, v: Floats | None, scale: float
) -> DeltaCounts:
    a, b = shape
    delta, counts = np.empty(shape, np.float32), DeltaCounts()
    for start in range(0, a, _PRODUCT_ROWS):
        stop = min(start + _PRODUCT_ROWS, a)
        _, d, bad = _delta(part.part(start * b, stop * b))
        delta[start:stop] = d.reshape(-1, b) if mask is None else d.reshape(-1, b) * mask[start:stop]
        zeros = int(np.count_nonzero(d == 0)) - bad
        counts += DeltaCounts(zero_deltas=zeros, nonfinite=bad, energy=sum_of_squares(d))
    _remove_directions(delta, u, v)
    for start in range(0, a, _PRODUCT_ROWS):
        stop = min(start + _PRODUCT_ROWS, a)
        rows, d = part.part(start * b, stop * b), delta[start:stop].reshape(-1)
        np.multiply(d, np.float32(scale), out=d)
        kept, lost = _add_rounded(rows, widen(rows.base, rows.base_code), d, Scratch(d.size))
        counts += DeltaCounts(kept=kept, rounded_away=lost, energy_kept=sum_of_squares(d))
    return counts


def _remove_directions(d: Floats, u: Floats | None, v: Floats | None) -> None:
    """Take the directions out of d [a, b] in place: of its columns u [a, k], of its rows v [b, k].

    Rows go one stretch after the other, so that no second matrix of that size is needed.
    """
    inside = None if u is None else u.T @ d
    for start in range(0, d.shape[0], _PRODUCT_ROWS):
        rows = d[start : start + _PRODUCT_ROWS]
        if u is not None and inside is not None:
            rows -= u[start : start + _PRODUCT_ROWS] @ inside
        if v is not None:
            rows -= (rows @ v) @ v.T


def _matrix_of(directions: Floats | None, number: int) -> Floats | None:
    """Directions of one matrix out of a stack of them."""
    if directions is None:
        return None
    return directions.reshape(-1, *directions.shape[-2:])[number]  # type: ignore[no-any-return]


def _delta(part: TensorPair) -> tuple[Floats, Floats, int]:
    """w, f - w, and how many entries of that were not finite and are now zero."""
    w, d = deltas(part.base, part.base_code, part.tuned, part.tuned_code, Scratch(part.base.size))
    return w, d, _drop_nonfinite(d)


def _drop_nonfinite(d: Floats) -> int:
    """Put zeros in the place of what is not finite; how many there were."""
    broken = ~np.isfinite(d)
    bad = int(np.count_nonzero(broken))
    if bad:
        d[broken] = 0
    return bad


def _add_rounded(part: TensorPair, w: Floats, d: Floats, scratch: Scratch) -> tuple[int, int]:
    """Put w + d in the place of w, rounded once; how many entries that changes, and for how many d was too small."""
    size, code = w.size, part.base_code
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = narrow(np.add(w, d, out=scratch.floats[2][:size]), code)
    changed = scratch.flags[0][:size]
    np.not_equal(widen(rounded, code, scratch.floats[2][:size]), w, out=changed)
    copy_flagged(replace(part, tuned=rounded, tuned_code=code), changed, scratch)  # not all: -0.0 + 0.0 is 0.0
    kept = int(np.count_nonzero(changed))
    return kept, int(np.count_nonzero(d)) - kept
