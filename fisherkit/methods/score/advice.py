"""Advice on a sweep: the point that does best on the new task without costing more of the old than a budget allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fisherkit.errors import OptionError
from fisherkit.kernels.front import front
from fisherkit.methods.score.report import CheckpointScore, ScoreReport
from fisherkit.options.budget import Budget

DEFAULT_NATS = 0.02
"""What may be lost on the first prompt set where nothing is said: a fiftieth of a nat per token."""


@dataclass(frozen=True)
class Advice:
    """Advice on a sweep.

    Attributes:
        chosen: name of the point; None if none stays within the budget.
        line: for a person.
    """

    chosen: str | None
    line: str


def check_budgets(budgets: Sequence[Budget], sets: Sequence[str]) -> tuple[Budget, ...]:
    """Return the budgets, or the default one; refuse those that no advice can be given with.

    Args:
        budgets: as given.
        sets: names of the prompt sets.

    Raises:
        OptionError: a set that is not there or has two budgets, mixed units, or no set left to do well on.
    """
    if not budgets and sets:
        budgets = (Budget(sets[0], DEFAULT_NATS),)
    bound = [budget.name for budget in budgets]
    for name in bound:
        if name not in sets:
            raise OptionError(f"--budget names {name!r}; the prompt sets are {', '.join(sets)}")
        if bound.count(name) > 1:
            raise OptionError(f"--budget bounds {name!r} twice; give one bound for each set")
    if len({budget.is_exact for budget in budgets}) > 1:
        raise OptionError("--budget: bounds in nats and in % of exact matches cannot be weighed together; choose one")
    if set(bound) == set(sets):
        raise OptionError("a sweep is judged by at least two prompt sets: --prompts old=FILE --prompts new=FILE")
    return tuple(budgets)


def front_of(report: ScoreReport) -> list[str]:
    """Return the names of the checkpoints that no other beats on all sets, in the order of the first set's losses."""
    places = [[one.sets[name].loss for name in report.sets] for one in report.checkpoints]
    return [report.checkpoints[at].name for at in front(places)]


def advise(
    report: ScoreReport, budgets: Sequence[Budget], points: Sequence[str], controls: Sequence[str] = (), tuned: str = ""
) -> Advice:
    """Choose among the points of a sweep.

    Best is the lowest loss, or the most exact matches, on the sets without a budget: their mean.

    Args:
        report: holds the points; its first checkpoint is what they are compared with.
        budgets: from check_budgets.
        points: names of the checkpoints to choose among.
        controls: names of those that only tell whether the choice means anything.
        tuned: name of the whole fine-tune.
    """
    by_name = {one.name: one for one in report.checkpoints}
    task = _Task(report, budgets)
    within = [name for name in points if task.excess(by_name[name]) <= 0]
    if not within:
        nearest = min(points, key=lambda name: task.excess(by_name[name]))
        return Advice(
            None, f"no point stays within {task.bounds}; the nearest is {nearest} ({task.old(by_name[nearest])})"
        )
    best = min(within, key=lambda name: task.rank(by_name[name]))
    line = f"{best}: {task.new(by_name[best])}; {task.old(by_name[best])}, within {task.bounds}"
    rivals = [name for name in controls if task.excess(by_name[name]) <= 0]
    better = [name for name in rivals if task.rank(by_name[name]) <= task.rank(by_name[best])]
    if tuned in by_name and task.excess(by_name[tuned]) <= 0:
        line += f"; {tuned} itself is within it, too"
    if better:
        line += f"; but {better[0]}, a control, does as well"
    return Advice(best, line)


class _Task:
    """Figures of checkpoints in the unit of the budgets."""

    def __init__(self, report: ScoreReport, budgets: Sequence[Budget]) -> None:
        self._budgets = budgets
        self._is_exact = budgets[0].is_exact
        bound = {budget.name for budget in budgets}
        self._new = [name for name in report.sets if name not in bound]
        self._first = report.checkpoints[0]

    @property
    def bounds(self) -> str:
        return " and ".join(map(str, self._budgets))

    def excess(self, one: CheckpointScore) -> float:
        """By how much the worst of the bounded sets is beyond its bound; at most 0 within all of them."""
        return max(self._beyond(one, budget) for budget in self._budgets)

    def _beyond(self, one: CheckpointScore, budget: Budget) -> float:
        change = self._change(one, budget.name)
        beyond = budget.change - change if self._is_exact else change - budget.change
        # A bound that is met exactly is met: 0.79 - 0.8 is a little less than -0.01.
        return math.inf if math.isnan(beyond) else 0.0 if abs(beyond) < 1e-12 else beyond

    def _change(self, one: CheckpointScore, name: str) -> float:
        here, first = one.sets[name], self._first.sets[name]
        return here.exact - first.exact if self._is_exact else here.loss - first.loss

    def rank(self, one: CheckpointScore) -> tuple[float, float]:
        """Lower is better; of as many exact matches, the lower loss."""
        loss = sum(one.sets[name].loss for name in self._new) / len(self._new)
        exact = sum(one.sets[name].exact for name in self._new) / len(self._new)
        return (-exact if self._is_exact else loss, loss)

    def new(self, one: CheckpointScore) -> str:
        parts = []
        for name in self._new:
            here, first = one.sets[name], self._first.sets[name]
            if self._is_exact:
                parts.append(f"{name} {here.exact:.1%} exact (from {first.exact:.1%})")
            else:
                parts.append(f"{name} {here.loss:.4g} nats per token (from {first.loss:.4g})")
        return ", ".join(parts)

    def old(self, one: CheckpointScore) -> str:
        return ", ".join(self._told(one, budget.name) for budget in self._budgets)

    def _told(self, one: CheckpointScore, name: str) -> str:
        if self._is_exact:
            return f"{name} {100 * self._change(one, name):+.2g} points exact"
        change = one.sets[name].change
        width = f" ± {change.ci95:.2g}" if change is not None and change.ci95 is not None else ""
        return f"{name} {self._change(one, name):+.4f}{width}"
