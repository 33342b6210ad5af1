"""One tensor's delta masked, kept out of directions and scaled, in this order; both sides are in memory.

The result is ``w + s P(mask * (f - w))``, computed in float32 and rounded once. Where nothing but a mask acts, entries
are selected instead, so that each is bit-identical to one side; where the delta ends up zero, the base's bits stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fisherkit.floats import Floats, narrow, widen
from fisherkit.kernels.prune import TensorPair, copy_flagged
from fisherkit.kernels.prune_scores import BLOCK, Flags, Scratch
from fisherkit.pairs.parallel import BlockPool

_PRODUCT_ROWS = 1024  # rows of a matrix that are multiplied at a time


@dataclass(frozen=True)
class Treatment:
    """What happens to a delta.

    Attributes:
        mask: broadcastable to the tensor: True where it may change; None for everywhere.
        u: [..., a, k] directions of the last axis but one that are removed; None for none.
        v: [..., b, k] directions of the last axis that are removed; None for none.
        scale: factor at the end.
    """

    mask: Flags | None = None
    u: Floats | None = None
    v: Floats | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Blended:
    """Counts, and sums of squares.

    Attributes:
        kept: entries that differ from the base's after all.
        zero_deltas: entries that FT had not changed.
        nonfinite: entries that are NaN or infinite on either side; the base's.
        rounded_away: entries whose delta is too small for the base's type, so that they stay the base's.
        energy: sum of d^2.
        energy_kept: sum of squares of what is left of d.
    """

    kept: int
    zero_deltas: int
    nonfinite: int
    rounded_away: int
    energy: float
    energy_kept: float


def blend(sides: TensorPair, shape: tuple[int, ...], treatment: Treatment, team: BlockPool) -> Blended:
    """Overwrite the base's side with the result.

    Args:
        sides: both sides, flat.
        shape: of the tensor.
        treatment: what to do; its parts fit the shape.
        team: threads.
    """
    width = max(1, shape[-1] if shape else 1)
    mask = None if treatment.mask is None else np.broadcast_to(treatment.mask, shape).reshape(-1, width)
    if treatment.u is not None or treatment.v is not None:
        return _project(sides, shape, mask, treatment)

    def one(start: int, stop: int) -> Blended:
        flags = None if mask is None else np.ascontiguousarray(mask[start:stop]).reshape(-1)
        return _elementwise(sides.part(start * width, stop * width), flags, treatment.scale)

    return _sum(team.map(one, sides.base.size // width, max(1, BLOCK // width)))


def _elementwise(part: TensorPair, flags: Flags | None, scale: float) -> Blended:
    w, d, bad = _delta(part)
    zeros = int(np.count_nonzero(d == 0)) - bad
    energy = _squares(d)
    if flags is not None:
        np.multiply(d, flags, out=d)
    if scale != 1:
        np.multiply(d, np.float32(scale), out=d)
        kept, lost = _put(part, w, d)
    else:
        changed = d != 0
        copy_flagged(part, changed, Scratch(part.base.size))
        kept, lost = int(np.count_nonzero(changed)), 0
    return Blended(kept, zeros, bad, lost, energy, _squares(d))


def _project(sides: TensorPair, shape: tuple[int, ...], mask: Flags | None, treatment: Treatment) -> Blended:
    """Matrix by matrix, of which the delta is held in float32; ``(I - U U^T) d (I - V V^T)``."""
    a, b = shape[-2:]
    found = []
    for number in range(sides.base.size // max(a * b, 1)):
        part = sides.part(number * a * b, (number + 1) * a * b)
        rows = None if mask is None else mask[number * a : (number + 1) * a]
        found.append(_project_one(part, (a, b), rows, number, treatment))
    return _sum(found)


def _project_one(
    part: TensorPair, shape: tuple[int, int], mask: Flags | None, number: int, treatment: Treatment
) -> Blended:
    a, b = shape
    delta, found = np.empty(shape, np.float32), []
    for start in range(0, a, _PRODUCT_ROWS):
        stop = min(start + _PRODUCT_ROWS, a)
        d, bad = _delta(part.part(start * b, stop * b))[1:]
        delta[start:stop] = d.reshape(-1, b) if mask is None else d.reshape(-1, b) * mask[start:stop]
        found.append(Blended(0, int(np.count_nonzero(d == 0)) - bad, bad, 0, _squares(d), 0.0))
    _remove(delta, _of(treatment.u, number), _of(treatment.v, number))
    for start in range(0, a, _PRODUCT_ROWS):
        stop = min(start + _PRODUCT_ROWS, a)
        rows, d = part.part(start * b, stop * b), delta[start:stop].reshape(-1)
        np.multiply(d, np.float32(treatment.scale), out=d)
        kept, lost = _put(rows, widen(rows.base, rows.base_code), d)
        found.append(Blended(kept, 0, 0, lost, 0.0, _squares(d)))
    return _sum(found)


def _remove(d: Floats, u: Floats | None, v: Floats | None) -> None:
    """Take the directions out of d [a, b] in place: of its columns u [a, k], of its rows v [b, k]."""
    held = None if u is None else u.T @ d
    for start in range(0, d.shape[0], _PRODUCT_ROWS):
        rows = d[start : start + _PRODUCT_ROWS]
        if u is not None and held is not None:
            rows -= u[start : start + _PRODUCT_ROWS] @ held
        if v is not None:
            rows -= (rows @ v) @ v.T


def _of(directions: Floats | None, number: int) -> Floats | None:
    """The directions of one matrix out of a stack of them."""
    if directions is None:
        return None
    return directions.reshape(-1, *directions.shape[-2:])[number]  # type: ignore[no-any-return]


def _delta(part: TensorPair) -> tuple[Floats, Floats, int]:
    """w, f - w, and how many entries of that were not finite and are now zero."""
    w = widen(part.base, part.base_code)
    with np.errstate(invalid="ignore", over="ignore"):
        d = widen(part.tuned, part.tuned_code) - w
    broken = ~np.isfinite(d)
    bad = int(np.count_nonzero(broken))
    if bad:
        d[broken] = 0
    return w, d, bad


def _put(part: TensorPair, w: Floats, d: Floats) -> tuple[int, int]:
    """Put w + d in the place of w, rounded once; how many entries that changes, and for how many d was too small."""
    rounded = narrow(w + d, part.base_code)
    changed = widen(rounded, part.base_code) != w
    np.copyto(part.base, rounded, where=changed)
    kept = int(np.count_nonzero(changed))
    return kept, int(np.count_nonzero(d)) - kept


def _squares(d: Floats) -> float:
    return float(np.sum(np.square(d, dtype=np.float64)))


def _sum(parts: Sequence[Blended]) -> Blended:
    return Blended(
        kept=sum(part.kept for part in parts),
        zero_deltas=sum(part.zero_deltas for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
        rounded_away=sum(part.rounded_away for part in parts),
        energy=sum(part.energy for part in parts),
        energy_kept=sum(part.energy_kept for part in parts),
    )
