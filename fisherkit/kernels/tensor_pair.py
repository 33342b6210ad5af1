"""One tensor of both checkpoints in their stored types: its parts, samples of it, conversions, and counts.

``w`` and ``f`` are flat stored arrays [n] of the base and the tuned tensor (see fisherkit.floats). numpy only.
"""

import operator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import FLOATING, Floats, Stored, narrow, widen
from fisherkit.kernels.compiled import row_sums
from fisherkit.kernels.llvm_loops import ROW
from fisherkit.kernels.prune_scores import Scratch, drawing

_ONE_SUM = 4096
"""Entries up to which a block is summed at once, not row by row."""


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
    rows = row_sums(w, code) if w.size > _ONE_SUM else None
    if rows is not None:
        total = _sum_of_rows(rows, np.abs(widen(w[rows.size * ROW :], code)))
        if np.isfinite(total):
            return total, 0
    values = scratch.floats[0][: w.size]
    np.abs(widen(w, code, values), out=values)
    with np.errstate(over="ignore"):
        total = float(np.add.reduce(values, dtype=np.float32)) if w.size <= _ONE_SUM else _pairwise(values)
    if np.isfinite(total):
        return total, 0
    finite = np.isfinite(values)
    return float(values[finite].sum(dtype=np.float64)), int(values.size - np.count_nonzero(finite))


def _pairwise(values: Floats) -> float:
    """A float64 sum of float32 sums of short rows: as exact as needed at the speed of float32."""
    rows = values[: values.size // ROW * ROW].reshape(-1, ROW).sum(axis=1)
    return _sum_of_rows(rows, values[rows.size * ROW :])


def _sum_of_rows(rows: Floats, rest: Floats) -> float:
    return float(rows.sum(dtype=np.float64)) + float(rest.sum(dtype=np.float64))


def nonfinite(stored: Stored, code: str) -> NDArray[np.int64]:
    """Return the indices of the infinities and NaN of a flat stored array."""
    return np.flatnonzero(~np.isfinite(widen(stored, code)))
