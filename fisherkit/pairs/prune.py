"""One tensor's delta pruned, both sides in memory: by a quota of its own, or by a threshold shared with others."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats, narrow, widen
from fisherkit.kernels.prune import (
    Part,
    Settled,
    TensorPair,
    block_scores,
    keep_block,
    sample_indices,
    sample_scores,
    settle_block,
)
from fisherkit.kernels.prune_scores import BLOCK, drawing
from fisherkit.kernels.rescale import FACTORS
from fisherkit.kernels.top_k import EVERYTHING, HistogramSelect, Threshold, ThresholdRange, sample_size, threshold_range
from fisherkit.pairs.parallel import BlockPool, starts

SIGN_SAMPLE = 1 << 12


@dataclass(frozen=True)
class Outcome:
    """What became of a tensor's delta.

    Attributes:
        kept: entries of FT's.
        zero_deltas: entries that did not change.
        zero_weights: entries that are zero in the base.
        nonfinite: entries that are NaN or infinite on a side; the base's.
        threshold: the lowest score that was kept; None if nothing was.
        energy: sum of d^2.
        energy_kept: sum of squares of what is left of d.
        ties: entries kept that scored exactly a shared threshold.
        rounded_away: entries whose rescaled delta is too small for the base's type, so that they stay the base's.
        indices: flat places of the kept entries, ascending, where they were asked for.
    """

    kept: int
    zero_deltas: int
    zero_weights: int
    nonfinite: int
    threshold: float | None
    energy: float
    energy_kept: float
    ties: int = 0
    rounded_away: int = 0
    indices: NDArray[np.int64] | None = None

    def row(self) -> dict[str, Any]:
        """For the report."""
        share = self.energy_kept / self.energy if self.energy else 0.0
        return {
            "kept": self.kept,
            "zero_deltas": self.zero_deltas,
            "zero_weights": self.zero_weights,
            "nonfinite": self.nonfinite,
            "threshold": self.threshold,
            "energy": self.energy,
            "energy_kept": share,
        }


def stream_of(name: str) -> int:
    """The random stream of a tensor: by its name, so that neither order nor company matters."""
    return zlib.crc32(name.encode())


@dataclass(frozen=True)
class Pruning:
    """How tensors are pruned.

    Attributes:
        team: threads.
        seed: of random scores.
        write: overwrite the base's side with the result; False only counts.
        list_kept: give the places of kept entries.
    """

    team: BlockPool
    seed: int = 0
    write: bool = True
    list_kept: bool = False

    def by_quota(self, load: Callable[[], TensorPair], kept: int, stream: int) -> tuple[TensorPair, Outcome]:
        """Keep the ``kept`` best entries of a tensor.

        A range from a sample makes one pass do; should the sample have misled, both sides are loaded again and the
        exact threshold is counted out.
        """
        sides = load()
        wanted = sample_size(sides.base.size)
        guess = (
            threshold_range(sample_scores(sides, wanted, self.seed, stream), kept, sides.base.size) if kept else NOTHING
        )
        parts = self._pass(sides, guess, stream)
        above, inside = sum(part.kept for part in parts), sum(part.scores.size for part in parts)
        if above > kept or (above + inside < kept and guess.low > EVERYTHING.low):
            sides = load() if self.write else sides
            return self.by_threshold(sides, self._exact_threshold(sides, kept, stream), stream)
        settled = settle_block(sides, parts, list(starts(sides.base.size)), kept - above, write=self.write)
        return sides, _outcome(parts, settled, guess, list_kept=self.list_kept)

    def by_threshold(self, sides: TensorPair, cut: Threshold, stream: int) -> tuple[TensorPair, Outcome]:
        """Keep what scores above a cut, and the first ``cut.ties`` of the entries that score just that."""
        parts = self._pass(sides, cut.threshold_range, stream)
        settled = settle_block(sides, parts, list(starts(sides.base.size)), cut.ties, write=self.write)
        return sides, _outcome(parts, settled, cut.threshold_range, list_kept=self.list_kept)

    def rescaled(self, sides: TensorPair, density: float, columns: int, stream: int) -> tuple[TensorPair, Outcome]:
        """Thin or shrink a delta by one of the metrics that are no selections; ``columns`` is the length of a row."""
        step = max(1, BLOCK // columns) * columns

        def one(start: int, stop: int) -> tuple[int, int, int, int, int, float, float]:
            part = sides.part(start, stop)
            w, f = widen(part.base, part.base_code), widen(part.tuned, part.tuned_code)
            with np.errstate(invalid="ignore", over="ignore"):
                d = f - w
            broken = ~np.isfinite(d)
            d[broken] = 0
            left = FACTORS[sides.metric](d, density, columns, drawing(self.seed, stream, start // step)) * d
            rounded = narrow(w + left, part.base_code)
            changed = widen(rounded, part.base_code) != w
            if self.write:
                np.copyto(part.base, rounded, where=changed)
            bad, kept = int(np.count_nonzero(broken)), int(np.count_nonzero(changed))
            zeros, lost = int(np.count_nonzero(d == 0)) - bad, int(np.count_nonzero(left)) - kept
            return kept, zeros, int(np.count_nonzero(w == 0)), bad, lost, _squares(d), _squares(left)

        parts = self.team.map(one, sides.base.size, step)
        kept, zeros, zero_weights, bad, lost, energy, left = (sum(column) for column in zip(*parts, strict=True))
        return sides, Outcome(
            kept=int(kept),
            zero_deltas=int(zeros),
            zero_weights=int(zero_weights),
            nonfinite=int(bad),
            threshold=None,
            energy=energy,
            energy_kept=left,
            rounded_away=int(lost),
        )

    def _pass(self, sides: TensorPair, guess: ThresholdRange, stream: int) -> list[Part]:
        def one(start: int, stop: int) -> Part:
            return keep_block(
                sides.part(start, stop),
                guess,
                self.team.scratch,
                drawing(self.seed, stream, start // BLOCK),
                write=self.write,
                list_kept=self.list_kept,
            )

        return self.team.map(one, sides.base.size)

    def _exact_threshold(self, sides: TensorPair, kept: int, stream: int) -> Threshold:
        tally = HistogramSelect(EVERYTHING, kept)

        def one(start: int, stop: int) -> Any:
            return tally.count(block_scores(sides.part(start, stop), self.team.scratch, self.seed, stream, start))

        while True:
            for counted in self.team.map(one, sides.base.size):
                tally.add(counted)
            cut = tally.narrow()
            if cut is not None:
                return cut


NOTHING = ThresholdRange(np.float32(np.inf), np.float32(np.inf))
"""Above this there is nothing."""


def _outcome(parts: Sequence[Part], settled: Settled, guess: ThresholdRange, *, list_kept: bool) -> Outcome:
    above = sum(part.kept for part in parts)
    indices = None
    if list_kept:
        listed = [part.kept_indices + at * BLOCK for at, part in enumerate(parts) if part.kept_indices is not None]
        indices = np.sort(np.concatenate([*listed, settled.indices]))
    return Outcome(
        kept=above + settled.kept,
        zero_deltas=sum(part.zero_deltas for part in parts),
        zero_weights=sum(part.zero_weights for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
        threshold=settled.lowest if settled.lowest is not None else float(guess.high) if above else None,
        energy=sum(part.energy for part in parts),
        energy_kept=sum(part.energy_kept for part in parts) + settled.energy_kept,
        ties=settled.kept,
        indices=indices,
    )


def _squares(values: Floats) -> float:
    wide = values.astype(np.float64)
    return float(np.dot(wide, wide))


def flipped_signs(sides: TensorPair) -> float:
    """Share of the entries whose sign changed, from a sample. Unrelated models have half, fine-tunes next to none."""
    some = sides.take(sample_indices(sides.base.size, SIGN_SAMPLE, 0, 0))
    return float(
        np.mean(np.signbit(widen(some.base, some.base_code)) != np.signbit(widen(some.tuned, some.tuned_code)))
    )
