"""Figures of runs: means with the task as the unit, fronts of old against new, and comparison at equal new loss.

Pure functions of numbers; ``tests/test_forgetting_measures.py`` has slow oracles and cases worked out by hand.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

Key = TypeVar("Key")
TEXT = "text"
"""The name of held-out plain text among the old tests."""
LEVELS = (0.5, 0.7, 0.9)
"""Where methods are compared: shares of the way from the base's loss on the new task to plain fine-tuning's best, on a
scale of logarithms."""

Point = tuple[float, float]
"""New score and old score; higher is better in both."""
Verdict = Literal["better", "worse", "equal", "not shown"]


class Cell(NamedTuple):
    """Where a run is made: which base, which draw of the tasks, and the task that is learnt (or learnt first)."""

    base: int
    seed: int
    task: str


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks and half of its 95 % interval (NaN with fewer than two tasks).

    Attributes:
        mean: of the tasks' means; NaN of nothing.
        half: by Student's t over these.
        tasks: how many.
        seeds: draws of the tasks behind it.
        bases: the mean of each base.
    """

    mean: float
    half: float
    tasks: int
    seeds: int
    bases: Mapping[int, float]

    @property
    def is_decided(self) -> bool:
        """True if the interval leaves out zero and every base says the same."""
        signs = {math.copysign(1, mean) for mean in self.bases.values() if mean}
        return self.half == self.half and abs(self.mean) > self.half and len(signs) == 1

    def verdict(self, margin: float) -> Verdict:
        """Return what it shows of a difference; ``equal`` is an interval within the margin named beforehand."""
        if self.is_decided:
            return "better" if self.mean > 0 else "worse"
        return "equal" if abs(self.mean) + self.half <= margin else "not shown"


def by_task(values: Mapping[Cell, float]) -> Estimate:
    """Return the mean with the task as the unit: draws and bases of one task are put together first; NaN is none."""
    known = {cell: value for cell, value in values.items() if not math.isnan(value)}
    means = list(_means(known, lambda cell: cell.task).values())
    mean = math.fsum(means) / len(means) if means else math.nan
    return Estimate(
        mean=mean,
        half=_half(means, mean),
        tasks=len(means),
        seeds=len({cell.seed for cell in known}),
        bases=_means(known, lambda cell: cell.base),
    )


def _means(values: Mapping[Cell, float], key: Callable[[Cell], Key]) -> dict[Key, float]:
    groups: dict[Key, list[float]] = {}
    for cell, value in values.items():
        groups.setdefault(key(cell), []).append(value)
    return {name: math.fsum(group) / len(group) for name, group in groups.items()}


def _half(values: Sequence[float], mean: float) -> float:
    count = len(values)
    if count < 2:
        return math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return student_t(count - 1) * deviation / math.sqrt(count)


def student_t(freedom: int, share: float = 0.95) -> float:
    """Return the t that holds ``share`` of the distribution between -t and t.

    Found by bisection of the exact sum for integers.
    """
    low, high = 0.0, 1000.0
    while high - low > 1e-12 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _between(t: float, freedom: int) -> float:
    """P(-t < T < t); Abramowitz and Stegun 26.7.3 and 26.7.4, finite sums of cosines."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    if freedom % 2 == 0:
        term, total = 1.0, 1.0
        for k in range(2, freedom, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        return sine * total
    total, term = 0.0, cosine
    for k in range(1, freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (theta + sine * total)


# Fronts.


def front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other beats in both, from the least to the most learnt; old falls along it."""
    best: list[Point] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def height(curve: Sequence[Point], new: float) -> float:
    """Return a front's old score at a new score, between its points on straight lines; NaN beyond its end.

    Below its beginning, which is the best of the old, it is that.
    """
    if new <= curve[0][0]:
        return curve[0][1]
    for (x1, y1), (x2, y2) in itertools.pairwise(curve):
        if x1 < new <= x2:
            return y1 + (y2 - y1) * (new - x1) / (x2 - x1)
    return math.nan


def lead(ours: Sequence[Point], theirs: Sequence[Point], at: Collection[float]) -> float:
    """Return by how much one front is above another, the mean over the new scores that both reach; NaN if none."""
    gaps = [height(ours, new) - height(theirs, new) for new in at]
    known = [gap for gap in gaps if not math.isnan(gap)]
    return math.fsum(known) / len(known) if known else math.nan


def ratio(ours: Sequence[Point], theirs: Sequence[Point], at: Collection[float], least: float) -> float:
    """Return one front's height over another's, the mean over the new scores that both reach; NaN if none.

    Args:
        ours: a front.
        theirs: what it is divided by.
        at: new scores.
        least: the other front counts where it is at least so high: a share of nothing says nothing.
    """
    heights = [(height(ours, new), height(theirs, new)) for new in at]
    known = [own / other for own, other in heights if not math.isnan(own) and other >= least]
    return math.fsum(known) / len(known) if known else math.nan


def reached(curve: Sequence[Point], at: Collection[float]) -> float:
    """Return the share of new scores that a front reaches."""
    return sum(not math.isnan(height(curve, new)) for new in at) / len(at)


def backward_transfer(learnt: Mapping[str, float], end: Mapping[str, float]) -> float:
    """BWT: mean over all tasks but the last of (score at the end - score right after learning it), in their order."""
    names = list(learnt)[:-1]
    return math.fsum(end[name] - learnt[name] for name in names) / len(names) if names else math.nan
