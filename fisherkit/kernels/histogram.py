"""A histogram of magnitudes whose bins are the leading bits of a float32, and the mass curve it gives.

The top 11 bits of a non-negative float32 (exponent and three bits of mantissa) number its bin, so that every octave
has eight equal steps and finding a bin is one shift. Bin 0 holds zeros and what is below 2**-129. Counts and sums are
exact; what lies inside a bin is interpolated. Standard library only: a stored histogram is read without torch.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

BINS_PER_OCTAVE = 8
MANTISSA_SHIFT = 20
"""Float32 bits below those that number a bin."""
BINS = 2040
"""Bins of finite numbers; the patterns above belong to infinities and NaN."""


def lower_edge(index: int) -> float:
    """Return the smallest number that falls into a bin."""
    return float(struct.unpack("<f", struct.pack("<I", index << MANTISSA_SHIFT))[0])


@dataclass(frozen=True)
class Histogram:
    """Counts and sums of finite magnitudes, zeros included; ``a + b`` is the histogram of both sets of entries.

    Attributes:
        bins: ``(bin, count, sum)`` of the non-empty bins, in ascending order.
    """

    bins: tuple[tuple[int, int, float], ...] = ()

    def __add__(self, other: "Histogram") -> "Histogram":
        merged: dict[int, tuple[int, float]] = {}
        for index, count, amount in self.bins + other.bins:
            before = merged.get(index, (0, 0.0))
            merged[index] = (before[0] + count, before[1] + amount)
        return Histogram(tuple((index, *merged[index]) for index in sorted(merged)))

    @cached_property
    def _curve(self) -> list[tuple[int, float]]:
        """Running count and sum from the largest bin down."""
        curve, count, total = [(0, 0.0)], 0, 0.0
        for _, entries, amount in reversed(self.bins):
            count, total = count + entries, total + amount
            curve.append((count, total))
        return curve

    @property
    def count(self) -> int:
        """Number of entries, zeros included."""
        return self._curve[-1][0]

    @property
    def total(self) -> float:
        """Sum of all entries."""
        return self._curve[-1][1]

    def mass(self, top: float) -> float:
        """Return the share of the total that the largest ``top`` (0 to 1) of all entries hold; 0.0 when all are zero.

        Zeros count as entries. Inside a bin the entries are taken to be equal, which is off by at most 1/8 of that bin.
        """
        wanted = top * self.count
        for (count, amount), (next_count, next_amount) in zip(self._curve, self._curve[1:], strict=False):
            if next_count >= wanted and self.total > 0:
                inside = (wanted - count) / (next_count - count)
                return (amount + inside * (next_amount - amount)) / self.total
        return 0.0

    def to_json(self) -> list[list[float]]:
        """Return ``[[bin, count, sum], ...]``."""
        return [list(entry) for entry in self.bins]

    @classmethod
    def from_json(cls, rows: Iterable[Iterable[float]]) -> "Histogram":
        """Read what to_json wrote; raises ValueError for rows that to_json would not write."""
        bins = tuple((int(index), int(count), float(amount)) for index, count, amount in rows)
        indices = [index for index, _, _ in bins]
        if indices != sorted(set(indices)) or any(not 0 <= i < BINS or n < 1 or s < 0 for i, n, s in bins):
            raise ValueError("histogram rows must be [bin, count, sum] with ascending bins and positive counts")
        return cls(bins)
