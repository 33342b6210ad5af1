"""Scores of the entries of a fine-tuned delta, one float32 each: the highest are kept.

Flat numpy blocks in, flat numpy blocks out; a block fits the cache of one core. w is the base weight, f the tuned one,
d = f - w, m the mean of |w| over the whole tensor. All arithmetic is float32. An entry that did not change (d = 0)
scores -inf under every metric and so never spends quota.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats, Stored, widen

Flags = NDArray[np.bool_]

BLOCK = 1 << 18
"""Entries of a block: large enough that calls of numpy cost little, small enough that its buffers stay in cache."""
LOWEST = np.float32(np.finfo(np.float32).min)
"""The lowest score that can be kept."""


class Scratch:
    """Memory for one block, reused by a thread for block after block."""

    def __init__(self, size: int = BLOCK) -> None:
        self.floats = tuple(np.empty(size, np.float32) for _ in range(4))
        self.flags = tuple(np.empty(size, np.bool_) for _ in range(2))


def deltas(w: Stored, w_code: str, f: Stored, f_code: str, scratch: Scratch) -> tuple[Floats, Floats]:
    """Return ``(w, f - w)`` in float32 [n], in the first two buffers of ``scratch``.

    Args:
        w: [n] stored entries of the base.
        w_code: their safetensors code.
        f: [n] stored entries of FT.
        f_code: their safetensors code.
        scratch: memory of at least n entries.
    """
    weight, delta = (buffer[: w.size] for buffer in scratch.floats[:2])
    widen(w, w_code, weight)
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(widen(f, f_code, delta), weight, out=delta)
    return weight, delta


def _fapm(w: Floats, d: Floats, mean: np.float32, out: Floats) -> None:
    np.divide(mean, w, out=out)
    np.subtract(np.float32(1), out, out=out)
    np.multiply(out, d, out=out)


def _relative(w: Floats, d: Floats, mean: np.float32, out: Floats) -> None:
    np.divide(d, w, out=out)
    np.negative(out, out=out)


def _magnitude(w: Floats, d: Floats, mean: np.float32, out: Floats) -> None:
    np.copyto(out, d)


_METRICS: Mapping[str, Callable[[Floats, Floats, np.float32, Floats], None]] = {
    "fapm": _fapm,
    "relative": _relative,
    "magnitude": _magnitude,
}


def score(metric: str, w: Floats, d: Floats, mean: float, out: Floats, draw: "Draw | None" = None) -> Floats:
    """Put the scores of a block into ``out``, from **magnitudes** |w| and |d|, and return them.

    - ``fapm``: ``|d| (1 - m/|w|)``, which is ``|d| - m |d|/|w|`` (FAPM, arXiv 2509.08255) without its cancellation.
    - ``relative``: ``-|d|/|w|``, its second term alone; ``magnitude``: ``|d|``, its first.
    - ``random``: a uniform draw, the control.

    Where a metric divides by |w|, an entry with w = 0 scores -inf as well. NaN comes out for what is not finite.

    Args:
        metric: one of the above.
        w: [n] float32, |w|.
        d: [n] float32, |d|.
        mean: m.
        out: [n] float32, where the scores go.
        draw: where ``random`` gets its numbers.
    """
    if metric == "random":
        assert draw is not None, "random scores are drawn"
        draw(out)
    else:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            _METRICS[metric](w, d, np.float32(mean), out)
    return out


def exclude_ineligible(metric: str, w: Floats, d: Floats, out: Floats) -> None:
    """Score entries without a claim -inf, and put scores below float32's range to its lowest number.

    Needed where a threshold may be negative; above zero these entries are never kept as they are.

    Args:
        metric: as for score.
        w: [n] float32, |w|.
        d: [n] float32, |d|.
        out: [n] float32 scores, changed in place.
    """
    finite = np.isfinite(d)  # false for a NaN or infinity in either checkpoint
    np.maximum(out, LOWEST, out=out)
    out[~finite | (d == 0)] = -np.inf
    if metric in ("fapm", "relative"):
        out[w == 0] = -np.inf


Draw = Callable[[Floats], None]


def _words(numbers: Sequence[int]) -> NDArray[np.uint64]:
    return np.array([number % (1 << 64) for number in numbers], np.uint64)


def drawing(seed: int, stream: int, block: int) -> Draw:
    """Return a function that fills an array with uniform numbers in [0, 1).

    They are the same for the same seed, stream and block.

    Streams (a tensor's) and blocks are independent of each other, so threads may take them in any order.

    Args:
        seed: of the run.
        stream: of the tensor.
        block: number of the block in the tensor.
    """

    def draw(out: Floats) -> None:
        key, counter = (seed, stream), (0, 0, 0, block)
        bits = np.random.Philox(key=_words(key), counter=_words(counter))
        np.random.Generator(bits).random(out=out, dtype=np.float32)

    return draw
