"""Keeping the best-scored entries of a fine-tuned delta, block by block: score, compare, copy, count, in one pass.

``w`` and ``f`` are flat stored arrays of the base and the tuned tensor (see fisherkit.floats); a kept entry of ``w``
is overwritten with that of ``f``, rounded to the type of ``w`` where the two differ. Nothing is added, so that every
entry is bit-identical to one side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import FLOATING, Floats, Stored, narrow, widen
from fisherkit.kernels.prune_scores import BLOCK, Draw, Flags, Scratch, deltas, drawing, score, settle_ends
from fisherkit.kernels.top_k import ThresholdRange, top_k_mask

SAMPLE_STREAM = -BLOCK
"""Where a sample's random numbers begin: one block before the tensor's own, so that the two streams never meet."""
_TYPICAL = (1e-30, 1e30)  # sums of squares in float32 that lost nothing worth naming


@dataclass(frozen=True)
class TensorPair:
    """The two sides of a tensor, flat, with their types, the metric and the base's mean magnitude."""

    base: Stored
    base_code: str
    tuned: Stored
    tuned_code: str
    metric: str = "fapm"
    mean: float = 0.0

    def part(self, start: int, stop: int) -> "TensorPair":
        """Entries ``start`` to ``stop`` as views."""
        return TensorPair(
            self.base[start:stop], self.base_code, self.tuned[start:stop], self.tuned_code, self.metric, self.mean
        )

    def take(self, indices: NDArray[np.int64]) -> "TensorPair":
        """Copies of some entries."""
        return TensorPair(
            self.base[indices], self.base_code, self.tuned[indices], self.tuned_code, self.metric, self.mean
        )


@dataclass(frozen=True)
class Part:
    """What one pass over one block found.

    Attributes:
        kept: entries that were kept at sight.
        zero_deltas: entries that did not change.
        zero_weights: entries that are zero in the base.
        nonfinite: entries that are NaN or infinite on either side; never kept.
        energy: sum of d^2.
        energy_kept: the same over the kept.
        indices: of the candidates, within the block.
        scores: of the candidates.
        kept_indices: of what was kept at sight, within the block, where they were asked for.
    """

    kept: int
    zero_deltas: int
    zero_weights: int
    nonfinite: int
    energy: float
    energy_kept: float
    indices: NDArray[np.int64]
    scores: Floats
    kept_indices: NDArray[np.int64] | None = None


def keep_block(
    sides: TensorPair,
    threshold_range: ThresholdRange,
    scratch: Scratch,
    draw: Draw | None = None,
    *,
    write: bool = True,
    list_kept: bool = False,
) -> Part:
    """Keep what scores above the threshold_range, list what lies inside of it.

    Args:
        sides: one block.
        threshold_range: see select.
        scratch: the thread's memory.
        draw: where random scores come from.
        write: False only counts.
        list_kept: give the places of what was kept at sight.
    """
    size = sides.base.size
    w, d = deltas(sides.base, sides.base_code, sides.tuned, sides.tuned_code, scratch)
    s, (above, inside) = scratch.floats[2][:size], (flags[:size] for flags in scratch.flags)
    energy, bad = _energy(d), 0
    if not np.isfinite(energy):
        broken = ~np.isfinite(d)
        bad = int(np.count_nonzero(broken))
        d[broken] = 0  # scores as an entry that did not change: BASE's is kept
        energy = _energy(d)
    np.abs(w, out=w)
    np.abs(d, out=d)
    zero_deltas = int(np.count_nonzero(np.equal(d, 0, out=above))) - bad
    zero_weights = int(np.count_nonzero(np.equal(w, 0, out=above)))
    score(sides.metric, w, d, sides.mean, s, draw)
    if threshold_range.low <= 0 or sides.metric == "random":
        settle_ends(sides.metric, w, d, s)
    np.greater(s, threshold_range.high, out=above)
    np.greater_equal(s, threshold_range.low, out=inside)
    np.bitwise_xor(above, inside, out=inside)
    kept_part = scratch.floats[3][:size]
    np.multiply(d, above, out=kept_part)
    part = Part(
        kept=int(np.count_nonzero(above)),
        zero_deltas=zero_deltas,
        zero_weights=zero_weights,
        energy=energy,
        nonfinite=bad,
        energy_kept=_energy(kept_part),
        indices=(indices := np.flatnonzero(inside)),
        scores=s[indices],
        kept_indices=np.flatnonzero(above) if list_kept else None,
    )
    if write:
        copy_flagged(sides, above, scratch)
    return part


def settle_block(
    sides: TensorPair, parts: Sequence[Part], starts: Sequence[int], wanted: int, *, write: bool = True
) -> "Settled":
    """Choose among the candidates of all parts of a tensor, and keep those.

    Args:
        sides: the whole tensor.
        parts: in the order of its blocks.
        starts: where each block begins.
        wanted: how many of the candidates to keep.
        write: False only counts.
    """
    indices = np.concatenate([part.indices + start for part, start in zip(parts, starts, strict=True)])
    scores = np.concatenate([part.scores for part in parts])
    flags = top_k_mask(scores, wanted)
    chosen = sides.take(indices[flags])
    difference = widen(chosen.tuned, chosen.tuned_code) - widen(chosen.base, chosen.base_code)
    if write:
        sides.base[indices[flags]] = converted(chosen.tuned, chosen.tuned_code, chosen.base_code)
    lowest = float(scores[flags].min()) if chosen.base.size else None
    return Settled(chosen.base.size, _energy(difference), lowest, indices[flags])


@dataclass(frozen=True)
class Settled:
    """How many candidates were kept, their sum of d^2, the lowest score among them, and their places."""

    kept: int
    energy_kept: float
    lowest: float | None
    indices: NDArray[np.int64]


def block_scores(sides: TensorPair, scratch: Scratch, seed: int, stream: int, start: int) -> Floats:
    """All scores of the block that begins at ``start``, in the third buffer of ``scratch``."""
    w, d = deltas(sides.base, sides.base_code, sides.tuned, sides.tuned_code, scratch)
    s = scratch.floats[2][: w.size]
    np.abs(w, out=w)
    np.abs(d, out=d)
    score(sides.metric, w, d, sides.mean, s, drawing(seed, stream, start // BLOCK))
    settle_ends(sides.metric, w, d, s)
    return s


def sample_scores(sides: TensorPair, wanted: int, seed: int, stream: int) -> Floats:
    """Scores of about ``wanted`` entries spread evenly over a tensor: all of them where it has no more.

    Random scores are drawn afresh: any draw has the same distribution.
    """
    indices = sample_indices(sides.base.size, wanted, seed, stream)
    return block_scores(sides.take(indices), Scratch(indices.size), seed, stream, SAMPLE_STREAM).copy()


def sample_indices(count: int, wanted: int, seed: int, stream: int) -> NDArray[np.int64]:
    """One index out of each of ``wanted`` equal stretches of ``count``; all indices where there are no more."""
    if wanted >= count:
        return np.arange(count, dtype=np.int64)
    jitter = np.empty(wanted, np.float32)
    drawing(seed, stream, (1 << 62) + 1)(jitter)
    edges = np.arange(wanted, dtype=np.float64) * (count / wanted)
    return np.minimum(edges + jitter * (count / wanted), count - 1).astype(np.int64)


def copy_flagged(sides: TensorPair, flags: Flags, scratch: Scratch) -> None:
    """``w[flags] = f[flags]``, in the type of ``w``."""
    f = converted(sides.tuned, sides.tuned_code, sides.base_code)
    if f.itemsize > 4:
        np.copyto(sides.base, f, where=flags)
        return
    # Blending bits is five times as fast as a masked copy.
    kind = np.dtype(f"u{f.itemsize}")
    w, f = sides.base.view(kind), f.view(kind)
    blend = scratch.floats[2].view(kind)[: w.size]
    np.bitwise_xor(w, f, out=blend)
    np.multiply(blend, flags, out=blend)
    np.bitwise_xor(w, blend, out=w)


def converted(stored: Stored, code: str, wanted: str) -> Stored:
    """Stored entries in another floating type; themselves where it is the same."""
    if code == wanted:
        return stored
    assert {code, wanted} <= FLOATING, "only floating types are converted"
    return narrow(widen(stored, code), wanted)


def round_to_base(part: TensorPair, out: Stored) -> tuple[int, int]:
    """Put FT's entries into ``out`` in the base's type; how many differed, and how many of those no longer do.

    A delta finer than the base's type is a delta in name only: the output could not hold it.
    """
    w, f = widen(part.base, part.base_code), widen(part.tuned, part.tuned_code)
    out[:] = narrow(f, part.base_code)
    differed = f != w
    return int(np.count_nonzero(differed)), int(np.count_nonzero(differed & (widen(out, part.base_code) == w)))


def magnitude_sum(w: Stored, code: str, scratch: Scratch) -> tuple[float, int]:
    """Sum of the finite |w| of a block, in float64, and how many entries are not finite."""
    values = scratch.floats[0][: w.size]
    np.abs(widen(w, code, values), out=values)
    total = float(np.add.reduce(values, dtype=np.float32)) if w.size <= 4096 else _pairwise(values)
    if np.isfinite(total):
        return total, 0
    finite = np.isfinite(values)
    return float(values[finite].sum(dtype=np.float64)), int(values.size - np.count_nonzero(finite))


def _pairwise(values: Floats) -> float:
    """A float64 sum of float32 sums of short rows: as exact as needed at the speed of float32."""
    rows = values[: values.size // 256 * 256].reshape(-1, 256).sum(axis=1)
    return float(rows.sum(dtype=np.float64)) + float(values[rows.size * 256 :].sum(dtype=np.float64))


def nonfinite(stored: Stored, code: str) -> NDArray[np.int64]:
    """Indices of the infinities and NaN of a flat stored array."""
    return np.flatnonzero(~np.isfinite(widen(stored, code)))


def _energy(d: Floats) -> float:
    """Sum of squares; in float64 where float32 would lose it. Infinite or NaN only if an entry is."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        total = float(np.dot(d, d))
    if _TYPICAL[0] < total < _TYPICAL[1]:
        return total
    wide = d.astype(np.float64)
    return float(np.dot(wide, wide))
