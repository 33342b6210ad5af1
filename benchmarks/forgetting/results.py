"""All finished runs of a size, by method and setting, and what is asked of them. Numbers only."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from benchmarks.forgetting.measures import Figures, Line, Mean, Point, above, figures, mean_interval

_NEXT_TO_NOTHING = 0.1
Arm = tuple[str, str]
"""Method and setting."""
Pair = tuple[int, str]
"""Seed and order: what runs are paired by."""
Read = Callable[[Figures], float]
ByPoint = Callable[[Figures], Point]
PLAIN: Arm = ("plain", "1")
_UNTUNED: Arm = ("base", "-")
_HOLDING = ("shield", "ewc", "pull", "pull-fisher", "activation")
"""Methods of which a larger setting changes less."""


def general(found: Figures) -> float:
    """Exact match of the old tasks."""
    return found.general


def new(found: Figures) -> float:
    """Exact match of the new tasks at the end (OP)."""
    return found.new


def one_general(found: Figures) -> float:
    """Exact match of the old tasks after one task."""
    return found.single[1]


def one_new(found: Figures) -> float:
    """Exact match of that task."""
    return found.single[0]


def by_exact(found: Figures) -> Point:
    """New and general score as exact match."""
    return found.new, found.general


def by_loss(found: Figures) -> Point:
    """New and general score as negative loss."""
    return -found.new_loss, -found.general_loss


def by_one(found: Figures) -> Point:
    """After one task, as exact match."""
    return found.single


def by_one_loss(found: Figures) -> Point:
    """After one task, as negative loss."""
    return -found.single_losses[0], -found.single_losses[1]


class Gain(NamedTuple):
    """General score above a curve at the same new-task score, and how many runs say so.

    ``outside`` of ``runs`` are beyond the curve's ends and counted all the same; ``dropped`` ones are there and neither
    better nor worse than the end.
    """

    gain: Mean
    outside: int
    runs: int
    dropped: int


class Results:
    """See the module.

    Args:
        lines: of one size.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)
        self.arms: dict[Arm, dict[Pair, Figures]] = {}
        for line in self.lines:
            arm = self.arms.setdefault((line["method"], line["setting"]), {})
            arm[line["seed"], line["order"]] = figures(line)
        self.untuned = self.arms.pop(_UNTUNED, {})

    @property
    def seeds(self) -> list[int]:
        """All that have a line."""
        return sorted({line["seed"] for line in self.lines})

    @property
    def orders(self) -> list[str]:
        """All that have a line."""
        return sorted({line["order"] for line in self.lines})

    def settings(self, method: str) -> list[str]:
        """Return the settings of a method, the weakest first where they are numbers."""
        found = [setting for name, setting in self.arms if name == method]
        return sorted(found, key=_as_number)

    def mean(self, arm: Arm, read: Read) -> Mean:
        """Over seeds, orders put together first."""
        return over_seeds({pair: read(found) for pair, found in self.arms.get(arm, {}).items()})

    def difference(self, ours: Arm, theirs: Arm, read: Read) -> Mean:
        """Paired by seed and order."""
        a, b = self.arms.get(ours, {}), self.arms.get(theirs, {})
        return over_seeds({pair: read(a[pair]) - read(b[pair]) for pair in a if pair in b})

    def gains(self, arm: Arm, point: ByPoint = by_one, against: str = "plain") -> dict[Pair, tuple[float, bool]]:
        """By pair: general score above the curve of ``against`` (see ``above``), and whether the curve gets there."""
        curves, found = self.curves(point, against), {}
        for pair, one in self.arms.get(arm, {}).items():
            at = point(one)
            if pair in curves and not math.isnan(at[0]):
                found[pair] = above(curves[pair], at)
        return found

    def gain(self, arm: Arm, point: ByPoint = by_one, against: str = "plain", orders: str = "") -> Gain:
        """Return the gain, all put together; of the named orders only."""
        found = {pair: one for pair, one in self.gains(arm, point, against).items() if pair[1] in (orders or pair[1])}
        gains = {pair: gain for pair, (gain, _) in found.items()}
        dropped = sum(map(math.isnan, gains.values()))
        outside = sum(not inside for _, inside in found.values()) - dropped
        return Gain(over_seeds(gains), outside, len(found), dropped)

    def gain_over(self, ours: Arm, theirs: Arm, point: ByPoint = by_one) -> Mean:
        """Difference of two arms' gains, paired."""
        a, b = self.gains(ours, point), self.gains(theirs, point)
        return over_seeds({pair: a[pair][0] - b[pair][0] for pair in a if pair in b})

    def curves(self, point: ByPoint, method: str = "plain") -> dict[Pair, list[Point]]:
        """Return for every seed and order the untuned model, then a method's settings, the weakest first.

        Interpolation ends at the plain fine-tune, which is its setting 1.
        """
        settings = self.settings(method)
        arms = [(method, setting) for setting in (settings[::-1] if method in _HOLDING else settings)]
        arms += [PLAIN] if method == "wise-ft" else []
        curves = {}
        for pair, start in self.untuned.items():
            runs = [self.arms[arm][pair] for arm in arms if pair in self.arms.get(arm, {})]
            curves[pair] = [at for at in map(point, (start, *runs)) if not math.isnan(at[0])]
        return curves

    def learners(self, share: float) -> list[Arm]:
        """Arms whose first task is learnt at least this share as well as by plain fine-tuning."""
        least = share * self.mean(PLAIN, one_new).mean
        return [arm for arm in self.arms if self.mean(arm, one_new).mean >= least]

    def forgotten(self, arm: Arm, *, single: bool) -> Mean:
        """FAPM's CF: by how much of it general ability fell, after the first task alone or after all."""
        lost = {}
        for pair, found in self.arms.get(arm, {}).items():
            start = self.untuned[pair].general if pair in self.untuned else 0.0
            if start:
                lost[pair] = 1 - (found.single[1] if single else found.general) / start
        return over_seeds(lost)

    def retained(self, arm: Arm, of: Arm, *, single: bool) -> Mean:
        """New-task score as a share of the whole fine-tune's; runs where that has next to nothing are left out."""
        shares = {}
        for pair, found in self.arms.get(arm, {}).items():
            whole = self.arms.get(of, {}).get(pair)
            full = 0.0 if whole is None else whole.single[0] if single else whole.new
            if full >= _NEXT_TO_NOTHING:
                shares[pair] = (found.single[0] if single else found.new) / full
        return over_seeds(shares)

    @cached_property
    def untuned_general(self) -> float:
        """Exact match of the base on its own tasks."""
        return over_seeds({pair: found.general for pair, found in self.untuned.items()}).mean


def over_seeds(values: Mapping[Pair, float]) -> Mean:
    """Mean and interval over seeds, orders of one seed put together first, as they share their tasks; NaN is none."""
    seeds: dict[int, list[float]] = {}
    for (seed, _), value in values.items():
        if not math.isnan(value):
            seeds.setdefault(seed, []).append(value)
    return mean_interval([math.fsum(of_seed) / len(of_seed) for of_seed in seeds.values()])


def _as_number(setting: str) -> tuple[float, str]:
    try:
        return float(setting.partition("@")[0]), setting
    except ValueError:
        return math.inf, setting
