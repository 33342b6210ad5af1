"""Keeping the best-scored entries of a fine-tuned delta, block by block: score, compare, copy, count, in one pass.

``w`` and ``f`` are flat stored arrays [n] of the base and the tuned tensor (see fisherkit.floats); a kept entry of
``w`` is overwritten with that of ``f``, rounded to the type of ``w`` where the two differ. Nothing is added, so that
every entry is bit-identical to that of one checkpoint.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats
from fisherkit.kernels.compiled import address, keep_loop
from fisherkit.kernels.llvm_loops import LANES
from fisherkit.kernels.prune_scores import BLOCK, Draw, Flags, Scratch, deltas, drawing, exclude_ineligible, score
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair, converted, sample_indices
from fisherkit.kernels.top_k import ThresholdRange, top_k_mask

SAMPLE_STREAM = -BLOCK
"""Where a sample's random numbers begin: one block before the tensor's own, so that the two streams never meet."""
_TYPICAL = (1e-30, 1e30)  # sums of squares in float32 that lost nothing worth naming


@dataclass(frozen=True)
class BlockResult:
    """Findings of one pass over one block.

    Attributes:
        counts: entries that were kept at sight count as kept.
        candidates: [c] their places in the block, ascending.
        scores: [c] float32, of the candidates.
        deltas: [c] float32, their magnitudes.
        kept_indices: places of what was kept at sight, ascending; None where they were not asked for.
    """

    counts: DeltaCounts
    candidates: NDArray[np.int64]
    scores: Floats
    deltas: Floats
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
    loop = keep_loop(pair.base_code, pair.metric) if pair.tuned_code == pair.base_code and not list_kept else None
    if loop is None:
        return _keep_by_numpy(pair, threshold_range, scratch, draw, write=write, list_kept=list_kept)
    vectors, size = pair.base.size // LANES, pair.base.size
    most = _keep_vectors(loop, pair.part(0, vectors * LANES), threshold_range, scratch, write=write)
    if vectors * LANES == size:
        return most
    rest = _keep_by_numpy(pair.part(vectors * LANES, size), threshold_range, scratch, write=write)
    return BlockResult(
        most.counts + rest.counts,
        np.concatenate([most.candidates, rest.candidates + vectors * LANES]),
        np.concatenate([most.scores, rest.scores]),
        np.concatenate([most.deltas, rest.deltas]),
    )


def _keep_vectors(
    loop: Callable[..., None], pair: TensorPair, threshold_range: ThresholdRange, scratch: Scratch, *, write: bool
) -> BlockResult:
    """Keep by a compiled loop; the size is a multiple of LANES."""
    size = pair.base.size
    places, scores, deltas = scratch.floats[0][:size].view(np.int32), scratch.floats[1][:size], scratch.floats[2][:size]
    counts, sums = np.empty(5, np.int64), np.empty(7, np.float64)
    loop(
        address(pair.base),
        address(pair.tuned),
        size // LANES,
        pair.mean,
        float(threshold_range.low),
        float(threshold_range.high),
        int(threshold_range.low <= 0),  # then what has no claim must be taken out
        int(write),
        *(address(array) for array in (places, scores, deltas, counts, sums)),
    )
    kept, zero_deltas, zero_weights, bad, found = map(int, counts)
    return BlockResult(
        DeltaCounts(
            kept=kept,
            zero_deltas=zero_deltas - bad,
            zero_weights=zero_weights,
            nonfinite=bad,
            energy=float(sums[5]),
            energy_kept=float(sums[6]),
        ),
        places[:found].astype(np.int64),
        scores[:found].copy(),
        deltas[:found].copy(),
    )


def _keep_by_numpy(
    pair: TensorPair,
    threshold_range: ThresholdRange,
    scratch: Scratch,
    draw: Draw | None = None,
    *,
    write: bool,
    list_kept: bool = False,
) -> BlockResult:
    size = pair.base.size
    w, d = deltas(pair.base, pair.base_code, pair.tuned, pair.tuned_code, scratch)
    s, (above, inside) = scratch.floats[2][:size], (flags[:size] for flags in scratch.flags)
    energy, bad = sum_of_squares(d), 0
    if not np.isfinite(energy):  # the sum is looked at first, because a test of every entry would cost a pass
        broken = ~np.isfinite(d)
        bad = int(np.count_nonzero(broken))
        d[broken] = 0  # scores as an entry that did not change: BASE's is kept
        energy = sum_of_squares(d)
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
            energy_kept=sum_of_squares(kept_delta),
        ),
        candidates,
        scores=s[candidates],
        deltas=d[candidates],
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
    scores, deltas = (np.concatenate([getattr(block, what) for block in blocks]) for what in ("scores", "deltas"))
    flags = top_k_mask(scores, wanted)
    places = np.concatenate([block.candidates + start for block, start in zip(blocks, starts, strict=True)])
    if not flags.all():
        places, scores, deltas = places[flags], scores[flags], deltas[flags]
    if write:
        pair.base[places] = converted(pair.tuned[places], pair.tuned_code, pair.base_code)
    lowest = float(scores.min()) if scores.size else None
    return KeptCandidates(scores.size, sum_of_squares(deltas), lowest, places)


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

    Random scores are drawn afresh: any draw has the same distribution. Tensors of one size are sampled at the same
    places.

    Args:
        pair: the whole tensor.
        wanted: how many scores.
        seed: of random scores, and of the places.
        stream: of the tensor's random numbers.
    """
    indices = _places(pair.base.size, wanted, seed)
    return block_scores(pair.take(indices), Scratch(indices.size), seed, stream, SAMPLE_STREAM).copy()


@functools.lru_cache(maxsize=4)
def _places(count: int, wanted: int, seed: int) -> NDArray[np.int64]:
    return sample_indices(count, wanted, seed, 0)


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


def sum_of_squares(d: Floats) -> float:
    """Return the sum of d^2, in float64 where float32 would lose it; infinite or NaN only if an entry is."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        total = float(np.dot(d, d))
    if _TYPICAL[0] < total < _TYPICAL[1]:
        return total
    wide = d.astype(np.float64)
    return float(np.dot(wide, wide))
