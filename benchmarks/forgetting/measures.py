"""Figures of runs: general ability, new tasks, forgetting, intervals, and comparison at a match.

Pure functions of numbers; ``tests/test_forgetting.py`` has the cases worked out by hand.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Line = dict[str, Any]
"""A finished run, see ``runs.do``."""
TEXT = "text"
"""The name of held-out plain text among the old tests."""

Point = tuple[float, float]
"""New-task score and general score; higher is better in both."""


class Mean(NamedTuple):
    """A mean and half of its 95 % interval (NaN with fewer than two values)."""

    mean: float
    half: float
    seeds: int

    @property
    def decided(self) -> bool:
        """True if the interval leaves out zero."""
        return self.half == self.half and abs(self.mean) > self.half


def mean_interval(values: Sequence[float]) -> Mean:
    """With Student's t; of nothing, NaN."""
    count = len(values)
    if not count:
        return Mean(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count < 2:
        return Mean(mean, math.nan, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Mean(mean, student_t(count - 1) * deviation / math.sqrt(count), count)


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


def backward_transfer(exact: Mapping[int, Mapping[str, float]]) -> float:
    """BWT: mean over all tasks but the last of (score at the end - score right after learning it).

    Args:
        exact: by stage (from 1), score of every task learnt so far, in the order of learning.
    """
    stages = sorted(exact)
    if len(stages) < 2:
        return math.nan
    last = exact[stages[-1]]
    learnt = [list(exact[stage])[-1] for stage in stages[:-1]]
    changes = [last[task] - exact[stage][task] for stage, task in zip(stages, learnt, strict=False)]
    return math.fsum(changes) / len(changes)


class Crossing(NamedTuple):
    """Greatest general score of a curve at a new-task score, and whether the curve gets there at all.

    ``beyond`` is the end that it does not reach: 1 above, -1 below, 0 inside.
    """

    general: float
    beyond: int


def best_at(curve: Sequence[Point], new: float) -> Crossing:
    """Look up a curve, between its points on straight lines.

    Args:
        curve: one point or more, in the order of the sweep, from no fine-tuning to the strongest.
        new: where to look.

    Returns:
        Beyond the ends of the curve, its general score at the nearest end (the best, where several points share it).
    """
    ends = min(x for x, _ in curve), max(x for x, _ in curve)
    at = min(max(new, ends[0]), ends[1])
    found = [general for score, general in curve if score == at]
    for (x1, y1), (x2, y2) in itertools.pairwise(curve):
        if min(x1, x2) < at < max(x1, x2):
            found.append(y1 + (y2 - y1) * (at - x1) / (x2 - x1))
    return Crossing(max(found), (new > at) - (new < at))


def above(curve: Sequence[Point], run: Point) -> tuple[float, bool]:
    """General of a run over that of a curve at the same new-task score, and whether the curve gets there.

    Returns:
        Beyond an end of the curve, first the difference to that end where it says which is better: who learns more is
        better if it keeps as much, who learns less is worse if it keeps less. NaN otherwise: neither is better.
    """
    there = best_at(curve, run[0])
    gain = run[1] - there.general
    return (math.nan if there.beyond * gain < 0 else gain), not there.beyond


# Of a line of results.


@dataclass(frozen=True)
class Figures:
    """A run in numbers; shares from 0 to 1, losses in nats.

    Attributes:
        general: mean exact match of the base's tasks at the end of the sequence; NaN where only one task was learnt, as
            all that follows down to ``bwt``.
        general_loss: mean loss of the same.
        text_loss: of held-out plain text.
        new: OP, mean exact match of the new tasks at the end.
        new_loss: mean loss of the same.
        learnt: mean exact match of each task right after it was learnt; NaN too where only the end is known.
        bwt: see ``backward_transfer``; NaN likewise.
        single: new and general score, exact match, after the first task alone.
        single_losses: the same as losses.
        single_text: loss of held-out plain text then.
    """

    general: float
    general_loss: float
    text_loss: float
    new: float
    new_loss: float
    learnt: float
    bwt: float
    single: Point
    single_losses: Point
    single_text: float


def figures(line: Line) -> Figures:
    """Return the figures of a line with one stage or more."""
    stages = {int(stage): found for stage, found in line["stages"].items()}
    last = stages[max(stages)]
    exact = {stage: {task: score[0] for task, score in found["new"].items()} for stage, found in stages.items()}
    every = max(stages) > 1 and sorted(stages) == list(range(1, max(stages) + 1))
    at_end = last if max(stages) != 1 else None
    learnt = [list(exact[stage].values())[-1] for stage in sorted(exact)] if every else []
    return Figures(
        general=_mean_of(at_end["old"], 0) if at_end else math.nan,
        general_loss=_mean_of(at_end["old"], 1) if at_end else math.nan,
        text_loss=at_end["old"][TEXT][1] if at_end else math.nan,
        new=_mean_of(at_end["new"], 0) if at_end else math.nan,
        new_loss=_mean_of(at_end["new"], 1) if at_end else math.nan,
        learnt=mean_interval(learnt).mean,
        bwt=backward_transfer(exact) if every else math.nan,
        single=_after_one(stages, 0),
        single_losses=_after_one(stages, 1),
        single_text=(stages.get(1) or stages[0])["old"][TEXT][1],
    )


def _after_one(stages: Mapping[int, Line], which: int) -> Point:
    """Return the scores of the untuned model on what comes first."""
    found = stages.get(1) or stages[0]
    return next(iter(found["new"].values()))[which], _mean_of(found["old"], which)


def _mean_of(scores: Mapping[str, Sequence[float]], which: int) -> float:
    values = [score[which] for name, score in scores.items() if name != TEXT]
    return math.fsum(values) / len(values)
