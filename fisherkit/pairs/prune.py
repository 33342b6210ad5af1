"""One tensor's delta pruned, in memory: by a quota of its own, or by a threshold that it shares with others."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import narrow, widen
from fisherkit.kernels.prune import (
    BlockResult,
    KeptCandidates,
    block_scores,
    keep_block,
    keep_top_candidates,
    sample_scores,
    sum_of_squares,
)
from fisherkit.kernels.prune_scores import BLOCK, Draw, drawing
from fisherkit.kernels.rescale import FACTORS
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair, sample_indices
from fisherkit.kernels.top_k import (
    EVERYTHING,
    NOTHING,
    HistogramSelect,
    Threshold,
    ThresholdRange,
    exact_thresholds,
    sample_size,
    threshold_range,
)
from fisherkit.pairs.parallel import BlockPool, block_starts

SIGN_SAMPLE = 1 << 12


@dataclass(frozen=True)
class Outcome:
    """Result of pruning a tensor's delta.

    Attributes:
        counts: entries and energies.
        threshold: the lowest score that was kept; None if nothing was, or nothing is selected.
        ties: entries kept that scored exactly a shared threshold.
        indices: [kept] flat places of the kept entries, ascending; None where they were not asked for.
    """

    counts: DeltaCounts
    threshold: float | None = None
    ties: int = 0
    indices: NDArray[np.int64] | None = None

    def row(self) -> dict[str, Any]:
        """Return what the report says of the tensor."""
        counts = self.counts
        return {
            "kept": counts.kept,
            "zero_deltas": counts.zero_deltas,
            "zero_weights": counts.zero_weights,
            "nonfinite": counts.nonfinite,
            "threshold": self.threshold,
            "energy": counts.energy,
            "energy_kept": counts.energy_kept / counts.energy if counts.energy else 0.0,
        }


def stream_of(name: str) -> int:
    """Return the random stream of a tensor: by its name, so that neither order nor company matters."""
    return zlib.crc32(name.encode())


@dataclass(frozen=True)
class Pruning:
    """Settings by which tensors are pruned.

    Attributes:
        pool: threads.
        seed: of random scores.
        write: overwrite the base's entries with the result; False only counts.
        list_kept: give the places of kept entries.
    """

    pool: BlockPool
    seed: int = 0
    write: bool = True
    list_kept: bool = False

    def by_quota(
        self, pair: TensorPair, kept: int, stream: int, reload: Callable[[], TensorPair]
    ) -> tuple[TensorPair, Outcome]:
        """Keep the ``kept`` best entries of a tensor.

        A range from a sample makes one pass do. Should the sample have misled, the tensor is loaded again, because its
        base may have been overwritten, and the exact threshold is found by counting.

        Args:
            pair: the tensor.
            kept: how many entries.
            stream: of the tensor's random numbers.
            reload: gives the tensor as it was.

        Returns:
            The tensor, its base pruned, and what became of the delta.
        """
        guess = NOTHING
        if kept:
            sample = sample_scores(pair, sample_size(pair.base.size), self.seed, stream)
            guess = threshold_range(sample, kept, pair.base.size)
        blocks = self._keep(pair, guess, stream)
        above, inside = sum(block.counts.kept for block in blocks), sum(block.scores.size for block in blocks)
        if above > kept or (above + inside < kept and guess.low > EVERYTHING.low):
            pair = reload() if self.write else pair
            return self.by_threshold(pair, self._exact_threshold(pair, kept, stream), stream)
        return pair, self._complete(pair, blocks, guess, kept - above)

    def by_threshold(self, pair: TensorPair, threshold: Threshold, stream: int) -> tuple[TensorPair, Outcome]:
        """Keep what scores above a threshold, and the first ``threshold.ties`` of the entries that score just that.

        Args:
            pair: the tensor.
            threshold: exact, over all tensors that share it.
            stream: of the tensor's random numbers.
        """
        blocks = self._keep(pair, threshold.threshold_range, stream)
        return pair, self._complete(pair, blocks, threshold.threshold_range, threshold.ties)

    def rescaled(self, pair: TensorPair, density: float, columns: int, stream: int) -> tuple[TensorPair, Outcome]:
        """Thin or shrink a delta by one of the metrics that are no selections; see kernels.rescale.

        Args:
            pair: the tensor.
            density: p, the share that is kept, or the factor of wise-ft.
            columns: length of a row.
            stream: of the tensor's random numbers.
        """
        step = max(1, BLOCK // columns) * columns  # whole rows, since DELLA ranks within them

        def one(start: int, stop: int) -> DeltaCounts:
            draw = drawing(self.seed, stream, start // step)
            return _rescale_block(pair.part(start, stop), density, columns, draw, write=self.write)

        return pair, Outcome(sum(self.pool.map(one, pair.base.size, step), DeltaCounts()))

    def _keep(self, pair: TensorPair, guess: ThresholdRange, stream: int) -> list[BlockResult]:
        def one(start: int, stop: int) -> BlockResult:
            return keep_block(
                pair.part(start, stop),
                guess,
                self.pool.scratch,
                drawing(self.seed, stream, start // BLOCK),
                write=self.write,
                list_kept=self.list_kept,
            )

        return self.pool.map(one, pair.base.size)

    def _complete(self, pair: TensorPair, blocks: Sequence[BlockResult], guess: ThresholdRange, wanted: int) -> Outcome:
        """Keep the ``wanted`` best candidates of all blocks, and sum up."""
        starts = block_starts(pair.base.size)
        late = keep_top_candidates(pair, blocks, starts, wanted, write=self.write)
        counts = sum((block.counts for block in blocks), DeltaCounts())
        threshold = late.lowest if late.lowest is not None else float(guess.high) if counts.kept else None
        indices = _all_indices(blocks, starts, late) if self.list_kept else None
        counts += DeltaCounts(kept=late.count, energy_kept=late.energy)
        return Outcome(counts, threshold, late.count, indices)

    def _exact_threshold(self, pair: TensorPair, kept: int, stream: int) -> Threshold:
        select = HistogramSelect(EVERYTHING, kept)

        def show(start: int, stop: int) -> None:
            select.show(block_scores(pair.part(start, stop), self.pool.scratch, self.seed, stream, start))

        return exact_thresholds({"": select}, lambda _: self.pool.map(show, pair.base.size))[""]


def _all_indices(blocks: Sequence[BlockResult], starts: Sequence[int], late: KeptCandidates) -> NDArray[np.int64]:
    at_sight = zip(blocks, starts, strict=True)
    listed = [block.kept_indices + start for block, start in at_sight if block.kept_indices is not None]
    return np.sort(np.concatenate([*listed, late.indices]))


def _rescale_block(part: TensorPair, density: float, columns: int, draw: Draw, *, write: bool) -> DeltaCounts:
    """Multiply the deltas of a block by the metric's factors; an entry whose delta vanishes keeps the base's bits."""
    w, f = widen(part.base, part.base_code), widen(part.tuned, part.tuned_code)
    with np.errstate(invalid="ignore", over="ignore"):
        d = f - w
    broken = ~np.isfinite(d)
    d[broken] = 0
    left = FACTORS[part.metric](d, density, columns, draw) * d
    rounded = narrow(w + left, part.base_code)
    changed = widen(rounded, part.base_code) != w
    if write:
        np.copyto(part.base, rounded, where=changed)
    bad, kept = int(np.count_nonzero(broken)), int(np.count_nonzero(changed))
    return DeltaCounts(
        kept=kept,
        zero_deltas=int(np.count_nonzero(d == 0)) - bad,
        zero_weights=int(np.count_nonzero(w == 0)),
        nonfinite=bad,
        rounded_away=int(np.count_nonzero(left)) - kept,
        energy=sum_of_squares(d),
        energy_kept=sum_of_squares(left),
    )


def flipped_signs(pair: TensorPair) -> float:
    """Return the share of entries whose sign changed, from a sample: half in unrelated models, next to none in FT."""
    some = pair.take(sample_indices(pair.base.size, SIGN_SAMPLE, 0, 0))
    base, tuned = widen(some.base, some.base_code), widen(some.tuned, some.tuned_code)
    return float(np.mean(np.signbit(base) != np.signbit(tuned)))
