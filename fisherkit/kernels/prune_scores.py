"""How much an entry of a fine-tuned delta deserves to be kept: one float32 per entry, the highest are kept.

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
    """``(w, f - w)`` in float32, in the first two buffers of ``scratch``."""
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
    """Scores of a block, from **magnitudes** |w| and |d|.

    - ``fapm``: ``|d| (1 - m/|w|)``, which is ``|d| - m |d|/|w|`` (FAPM, arXiv 2509.08255) without its cancellation.
    - ``relative``: ``-|d|/|w|``, its second term alone; ``magnitude``: ``|d|``, its first.
    - ``random``: a uniform draw, the control.

    Where a metric divides by |w|, an entry with w = 0 scores -inf as well. NaN comes out for what is not finite.

    Args:
        metric: one of the above.
        w: |w|.
        d: |d|.
        mean: m.
        out: where the scores go.
        draw: where ``random`` gets its numbers.
    """
    if metric == "random":
        assert draw is not None, "random scores are drawn"
        draw(out)
    else:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            _METRICS[metric](w, d, np.float32(mean), out)
    return out


def settle_ends(metric: str, w: Floats, d: Floats, out: Floats) -> None:
    """Put entries without a claim to -inf, and scores below float32's range to its lowest number.

    Needed where a threshold may be negative; above zero these entries are never kept as they are.
    """
    finite = np.isfinite(d)  # is false for a NaN or infinity on either side
    np.maximum(out, LOWEST, out=out)
    out[~finite | (d == 0)] = -np.inf
    if metric in ("fapm", "relative"):
        out[w == 0] = -np.inf


Draw = Callable[[Floats], None]


def _words(numbers: Sequence[int]) -> NDArray[np.uint64]:
    return np.array([number % (1 << 64) for number in numbers], np.uint64)


def drawing(seed: int, stream: int, block: int) -> Draw:
    """A function that fills an array with uniform numbers in [0, 1): the same for the same seed, stream and block.

    Streams (a tensor's) and blocks are independent of each other, so threads may take them in any order.
    """

    def draw(out: Floats) -> None:
        key, counter = (seed, stream), (0, 0, 0, block)
        bits = np.random.Philox(key=_words(key), counter=_words(counter))
        np.random.Generator(bits).random(out=out, dtype=np.float32)

    return draw
