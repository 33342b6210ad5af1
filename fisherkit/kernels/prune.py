"""Keeping the best-scored entries of a fine-tuned delta, block by block: score, compare, copy, count, in one pass.

``w`` and ``f`` are flat stored arrays [n] of the base and the tuned tensor (see fisherkit.floats); a kept entry of
``w`` is overwritten with that of ``f``, rounded to the type of ``w`` where the two differ. Nothing is added, so that
every entry is bit-identical to that of one checkpoint.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import FLOATING, Floats, Stored, narrow, widen
from fisherkit.kernels.prune_scores import BLOCK, Draw, Flags, Scratch, deltas, drawing, exclude_ineligible, score
from fisherkit.kernels.top_k import ThresholdRange, top_k_mask

SAMPLE_STREAM = -BLOCK
"""Where a sample's random numbers begin: one block before the tensor's own, so that the two streams never meet."""
_TYPICAL = (1e-30, 1e30)  # sums of squares in float32 that lost nothing worth naming


@dataclass(frozen=True)
class TensorPair:
    """One tensor of both checkpoints, flat.

    Attributes:
        base: [n] stored entries of BASE.
        base_code: their safetensors code, such as ``BF16``.
        tuned: [n] stored entries of FT.
        tuned_code: their code.
        metric: what entries are scored by; see prune_scores.score.
        mean: mean of |base| over the whole tensor, which ``fapm`` scores by.
    """

    base: Stored
    base_code: str
    tuned: Stored
    tuned_code: str
    metric: str = "fapm"
    mean: float = 0.0

    def part(self, start: int, stop: int) -> "TensorPair":
        """Entries ``start`` to ``stop`` as views."""
        return replace(self, base=self.base[start:stop], tuned=self.tuned[start:stop])

    def take(self, indices: NDArray[np.int64]) -> "TensorPair":
        """Copies of the entries at ``indices``."""
        return replace(self, base=self.base[indices], tuned=self.tuned[indices])


class DeltaCounts(NamedTuple):
    """Counts and sums of squares over some entries of a delta; ``a + b`` counts both.

    Attributes:
        kept: entries that are not BASE's any more.
        zero_deltas: entries that fine-tuning did not change.
        zero_weights: entries that are zero in BASE.
        nonfinite: entries that are NaN or infinite in either checkpoint; never kept.
        rounded_away: entries whose delta is too small for BASE's type, so that they stay BASE's.
        energy: sum of d^2, d = FT - BASE.
        energy_kept: sum of squares of what is left of d.
    """

    kept: int = 0
    zero_deltas: int = 0
    zero_weights: int = 0
    nonfinite: int = 0
    rounded_away: int = 0
    energy: float = 0.0
    energy_kept: float = 0.0

    def __add__(self, other: "DeltaCounts") -> "DeltaCounts":  # type: ignore[override]  # a tuple's would append
        return DeltaCounts._make(map(operator.add, self, other))


@dataclass(frozen=True)
class BlockResult:
    """Findings of one pass over one block.

    Attributes:
        counts: entries that were kept at sight count as kept.
        candidates: [c] their places in the block, ascending.
        scores: [c] float32, of the candidates.
        kept_indices: places of what was kept at sight, ascending; None where they were not asked for.
    """

    counts: DeltaCounts
    candidates: NDArray[np.int64]
    scores: Floats
    kept_indices: NDArray[np.int64] | None = None


def keep_block(
    pair: TensorPair,
    threshold_range: ThresholdRange,
    scratch: Scratch,
    draw: Draw | None = None,
    *,
    write: bool = True,
    list_kept: bool = False,
) -> BlockResult:
    """Keep what scores above the threshold range, and list what lies inside of it.

    Args:
        pair: one block of a tensor, at most BLOCK entries; the base's are overwritten.
        threshold_range: see kernels.top_k.
        scratch: the thread's memory.
        draw: where random scores come from.
        write: False only counts.
        list_kept: give the places of what was kept at sight.
    """
    size = pair.base.size
    w, d = deltas(pair.base, pair.base_code, pair.tuned, pair.tuned_code, scratch)
    s, (above, inside) = scratch.floats[2][:size], (flags[:size] for flags in scratch.flags)
    energy, bad = _energy(d), 0
    if not np.isfinite(energy):  # the sum is looked at first, because a test of every entry would cost a pass
        broken = ~np.isfinite(d)
        bad = int(np.count_nonzero(broken))
        d[broken] = 0  # scores as an entry that did not change: BASE's is kept
        energy = _energy(d)
    np.abs(w, out=w)
    np.abs(d, out=d)
    zero_deltas = int(np.count_nonzero(np.equal(d, 0, out=above))) - bad
    zero_weights = int(np.count_nonzero(np.equal(w, 0, out=above)))
    score(pair.metric, w, d, pair.mean, s, draw)
    if threshold_range.low <= 0 or pair.metric == "random":  # above zero no ineligible entry can score
        exclude_ineligible(pair.metric, w, d, s)
    np.greater(s, threshold_range.high, out=above)
    np.greater_equal(s, threshold_range.low, out=inside)
    np.bitwise_xor(above, inside, out=inside)  # what is above is also inside: this takes it out
    kept_delta = np.multiply(d, above, out=scratch.floats[3][:size])
    candidates = np.flatnonzero(inside)
    result = BlockResult(
        DeltaCounts(
            kept=int(np.count_nonzero(above)),
            zero_deltas=zero_deltas,
            zero_weights=zero_weights,
            nonfinite=bad,
            energy=energy,
            energy_kept=_energy(kept_delta),
        ),
        candidates,
        scores=s[candidates],
        kept_indices=np.flatnonzero(above) if list_kept else None,
    )
    if write:
        copy_flagged(pair, above, scratch)
    return result


@dataclass(frozen=True)
class KeptCandidates:
    """Candidates of a tensor that were kept.

    Attributes:
        count: how many.
        energy: their sum of d^2.
        lowest: the lowest score among them; None if there are none.
        indices: [count] their places in the flat tensor.
    """

    count: int
    energy: float
    lowest: float | None
    indices: NDArray[np.int64]


def keep_top_candidates(
    pair: TensorPair, blocks: Sequence[BlockResult], starts: Sequence[int], wanted: int, *, write: bool = True
) -> KeptCandidates:
    """Keep the highest-scored candidates of all blocks of a tensor; ties go to the lower index.

    Args:
        pair: the whole tensor; the base's entries are overwritten.
        blocks: what keep_block returned, in the order of the blocks.
        starts: where each block begins.
        wanted: how many of the candidates to keep.
        write: False only counts.
    """
    indices = np.concatenate([block.candidates + start for block, start in zip(blocks, starts, strict=True)])
    scores = np.concatenate([block.scores for block in blocks])
    flags = top_k_mask(scores, wanted)
    chosen = pair.take(indices[flags])
    delta = widen(chosen.tuned, chosen.tuned_code) - widen(chosen.base, chosen.base_code)
    if write:
        pair.base[indices[flags]] = converted(chosen.tuned, chosen.tuned_code, chosen.base_code)
    lowest = float(scores[flags].min()) if chosen.base.size else None
    return KeptCandidates(chosen.base.size, _energy(delta), lowest, indices[flags])


def block_scores(pair: TensorPair, scratch: Scratch, seed: int, stream: int, start: int) -> Floats:
    """Return all scores of the block that begins at ``start``, in the third buffer of ``scratch``.

    Args:
        pair: one block, at most BLOCK entries.
        scratch: the thread's memory.
        seed: of random scores.
        stream: of the tensor's random numbers.
        start: place of the block's first entry in the tensor; a multiple of BLOCK, or SAMPLE_STREAM.
    """
    w, d = deltas(pair.base, pair.base_code, pair.tuned, pair.tuned_code, scratch)
    s = scratch.floats[2][: w.size]
    np.abs(w, out=w)
    np.abs(d, out=d)
    score(pair.metric, w, d, pair.mean, s, drawing(seed, stream, start // BLOCK))
    exclude_ineligible(pair.metric, w, d, s)
    return s


def sample_scores(pair: TensorPair, wanted: int, seed: int, stream: int) -> Floats:
    """Return scores of about ``wanted`` entries spread evenly over a tensor: of all where it has no more.

    Random scores are drawn afresh: any draw has the same distribution.

    Args:
        pair: the whole tensor.
        wanted: how many scores.
        seed: of random scores, and of the places.
        stream: of the tensor's random numbers.
    """
    indices = sample_indices(pair.base.size, wanted, seed, stream)
    return block_scores(pair.take(indices), Scratch(indices.size), seed, stream, SAMPLE_STREAM).copy()


def sample_indices(count: int, wanted: int, seed: int, stream: int) -> NDArray[np.int64]:
    """Return one index out of each of ``wanted`` equal stretches of ``count``; all indices where there are no more.

    Args:
        count: entries of the tensor.
        wanted: how many indices.
        seed: of the places within the stretches.
        stream: of the tensor's random numbers.
    """
    if wanted >= count:
        return np.arange(count, dtype=np.int64)
    jitter = np.empty(wanted, np.float32)
    drawing(seed, stream, (1 << 62) + 1)(jitter)
    edges = np.arange(wanted, dtype=np.float64) * (count / wanted)
    return np.minimum(edges + jitter * (count / wanted), count - 1).astype(np.int64)


def copy_flagged(pair: TensorPair, flags: Flags, scratch: Scratch) -> None:
    """Copy FT's flagged entries over the base's, in the base's type: ``w[flags] = f[flags]``.

    Args:
        pair: one block; the base's entries are overwritten.
        flags: [n] bool.
        scratch: the thread's memory.
    """
    f = converted(pair.tuned, pair.tuned_code, pair.base_code)
    if f.itemsize > 4:
        np.copyto(pair.base, f, where=flags)
        return
    # w ^ ((w ^ f) * flag) is f where the flag is 1 and w where it is 0; five times as fast as a masked copy.
    kind = np.dtype(f"u{f.itemsize}")
    w, f = pair.base.view(kind), f.view(kind)
    blend = scratch.floats[2].view(kind)[: w.size]
    np.bitwise_xor(w, f, out=blend)
    np.multiply(blend, flags, out=blend)
    np.bitwise_xor(w, blend, out=w)


def converted(stored: Stored, code: str, wanted: str) -> Stored:
    """Return stored entries in another floating type; themselves where it is the same.

    Args:
        stored: entries.
        code: their safetensors code.
        wanted: the code they should have.
    """
    if code == wanted:
        return stored
    assert {code, wanted} <= FLOATING, "only floating types are converted"
    return narrow(widen(stored, code), wanted)


def round_to_base(part: TensorPair, out: Stored) -> tuple[int, int]:
    """Put FT's entries into ``out`` in the base's type; return how many differed, and how many no longer do.

    A delta finer than the base's type is a delta in name only: the output could not hold it.

    Args:
        part: one block.
        out: [n] in the base's stored type.
    """
    w, f = widen(part.base, part.base_code), widen(part.tuned, part.tuned_code)
    out[:] = narrow(f, part.base_code)
    differed = f != w
    return int(np.count_nonzero(differed)), int(np.count_nonzero(differed & (widen(out, part.base_code) == w)))


def magnitude_sum(w: Stored, code: str, scratch: Scratch) -> tuple[float, int]:
    """Return the sum of the finite |w| of a block, in float64, and how many entries are not finite.

    Args:
        w: [n] stored entries.
        code: their safetensors code.
        scratch: the thread's memory.
    """
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
    """Return the indices of the infinities and NaN of a flat stored array."""
    return np.flatnonzero(~np.isfinite(widen(stored, code)))


def _energy(d: Floats) -> float:
    """Sum of squares; in float64 where float32 would lose it. Infinite or NaN only if an entry is."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        total = float(np.dot(d, d))
    if _TYPICAL[0] < total < _TYPICAL[1]:
        return total
    wide = d.astype(np.float64)
    return float(np.dot(wide, wide))
