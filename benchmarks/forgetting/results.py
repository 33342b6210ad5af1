"""All finished runs of a size, by kind, method and setting, and what is asked of them. Numbers only."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.forgetting.lines import Kind, Line, Run
from benchmarks.forgetting.measures import (
    LEVELS,
    TEXT,
    Cell,
    Estimate,
    Point,
    backward_transfer,
    by_task,
    front,
    lead,
    ratio,
    reached,
)
from benchmarks.forgetting.settings import Setting, grid
from benchmarks.forgetting.tasks import PROBED, UNSEEN

Scores = Mapping[str, tuple[float, float]]
"""Exact match and loss by task."""


@dataclass(frozen=True)
class Outcome:
    """Scores of one run.

    Attributes:
        new: of the new tasks at the end, in the order of learning.
        old: of the base's tasks, and of TEXT.
        learnt: of each new task right after it was learnt; empty for a run of one task.
    """

    new: Scores
    old: Scores
    learnt: Scores


Read = Callable[[Outcome], float]
Runs = Mapping[Cell, Outcome]
Curves = Mapping[Cell, list[Point]]
Compare = Callable[[Sequence[Point], Sequence[Point], Collection[float]], float]
"""Compares two fronts at some new scores."""


def mean_of(scores: Scores, which: int, names: Iterable[str] | None = None) -> float:
    """Return the mean exact match (0) or loss (1) of some tasks; of all that are there, by default."""
    values = [scores[name][which] for name in (scores if names is None else names) if name in scores]
    return math.fsum(values) / len(values) if values else math.nan


def new(run: Outcome) -> float:
    """Exact match of the new tasks."""
    return mean_of(run.new, 0)


def new_loss(run: Outcome) -> float:
    """Loss of the new tasks."""
    return mean_of(run.new, 1)


def progress(run: Outcome) -> float:
    """How far the new tasks are learnt: minus the logarithm of their loss."""
    return -math.log(max(new_loss(run), 1e-6))


def old(run: Outcome) -> float:
    """Exact match of all old tasks."""
    return mean_of(run.old, 0, (*PROBED, *UNSEEN))


def average(run: Outcome) -> float:
    """Mean of old and new exact match."""
    return (old(run) + new(run)) / 2


def old_loss(run: Outcome) -> float:
    """Loss of all old tasks."""
    return mean_of(run.old, 1, (*PROBED, *UNSEEN))


def probed(run: Outcome) -> float:
    """Exact match of the old tasks that a method may look at."""
    return mean_of(run.old, 0, PROBED)


def unseen(run: Outcome) -> float:
    """Exact match of the old tasks that no method sees."""
    return mean_of(run.old, 0, UNSEEN)


def probed_loss(run: Outcome) -> float:
    """Loss of the old tasks that a method may look at."""
    return mean_of(run.old, 1, PROBED)


def unseen_loss(run: Outcome) -> float:
    """Loss of the old tasks that no method sees."""
    return mean_of(run.old, 1, UNSEEN)


def text_loss(run: Outcome) -> float:
    """Loss of held-out plain text."""
    return mean_of(run.old, 1, (TEXT,))


def learnt(run: Outcome) -> float:
    """Mean exact match of each new task right after it was learnt."""
    return mean_of(run.learnt, 0)


def transfer(run: Outcome) -> float:
    """Return what later tasks did to the new ones before them (BWT)."""
    return backward_transfer(*({name: score[0] for name, score in part.items()} for part in (run.learnt, run.new)))


LOSSES = frozenset((new_loss, old_loss, probed_loss, unseen_loss, text_loss))


class Results:
    """See the module.

    Args:
        lines: of one size.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self._arms: dict[tuple[Kind, str, str], dict[Cell, Outcome]] = {}
        for line in lines:
            run = Run.of(line["key"])
            arm = self._arms.setdefault((run.kind, run.method, run.setting), {})
            parts = (
                {name: tuple(score) for name, score in line.get(part, {}).items()} for part in ("new", "old", "learnt")
            )
            arm[run.cell] = Outcome(*parts)

    def runs(self, kind: Kind, method: str, setting: str) -> Runs:
        """Return the runs of a setting, by cell."""
        return self._arms.get((kind, method, setting), {})

    def settings(self, kind: Kind, method: str, *, length: int | None = 1) -> list[str]:
        """Return the settings of a method that have runs, with courses of one length, or of any."""
        found = [setting for where, name, setting in self._arms if (where, name) == (kind, method)]
        return [setting for setting in found if length in (None, Setting.of(setting).length)]

    def of_curve(self, kind: Kind, method: str) -> list[str]:
        """Return the settings that a method is compared by: of its grid, so that none has more than the others."""
        return self.known(kind, method, grid(method))

    def known(self, kind: Kind, method: str, settings: Iterable[str]) -> list[str]:
        """Return those of some settings that have runs."""
        return [setting for setting in settings if self.runs(kind, method, setting)]

    def methods(self, kind: Kind) -> list[str]:
        """Return the methods that have runs, in the order of the lines; the untuned base is none."""
        return [
            name for name in dict.fromkeys(name for where, name, _ in self._arms if where == kind) if name != "base"
        ]

    def mean(self, kind: Kind, method: str, setting: str, read: Read) -> Estimate:
        """Return a figure of a setting."""
        return by_task({cell: read(run) for cell, run in self.runs(kind, method, setting).items()})

    def untuned(self, kind: Kind, read: Read) -> Estimate:
        """Return a figure of the base."""
        return self.mean(kind, "base", "-", read)

    # Curves.

    def curves(
        self, kind: Kind, method: str, read: Read, settings: Iterable[str] | None = None
    ) -> dict[Cell, list[Point]]:
        """Return for each cell the front of progress and ``read``, of a method's settings and the untuned base.

        Args:
            kind: of runs.
            method: whose.
            read: of the old; a loss counts negative.
            settings: of the front, in place of ``of_curve``.
        """
        chosen = self.of_curve(kind, method) if settings is None else list(settings)
        sign = -1 if read in LOSSES else 1
        found = {}
        for cell, start in self.runs(kind, "base", "-").items():
            runs = [own[cell] for setting in chosen if cell in (own := self.runs(kind, method, setting))]
            if runs:
                found[cell] = front((progress(run), sign * read(run)) for run in (start, *runs))
        return found

    def levels(self, kind: Kind) -> dict[Cell, list[float]]:
        """Return for each cell the progress at which methods are compared, see LEVELS."""
        found = {}
        for cell, start in self.runs(kind, "base", "-").items():
            plain = [
                own[cell] for one in self.of_curve(kind, "plain") if cell in (own := self.runs(kind, "plain", one))
            ]
            if plain:
                begin, end = progress(start), max(map(progress, plain))
                found[cell] = [begin + share * (end - begin) for share in LEVELS]
        return found

    def lead(self, kind: Kind, ours: str, theirs: str, read: Read = old, **settings: Iterable[str] | None) -> Estimate:
        """Return by how much one method's curve lies above another's at equal new loss; plus is better.

        Args:
            kind: of runs.
            ours: a method.
            theirs: another.
            read: of the old.
            settings: ``of_ours`` and ``of_theirs``, in place of ``of_curve``.
        """
        curves = (
            self.curves(kind, ours, read, settings.get("of_ours")),
            self.curves(kind, theirs, read, settings.get("of_theirs")),
        )
        return self._at_levels(kind, *curves, lead)

    def ratio(self, kind: Kind, ours: str, theirs: str, read: Read = old, least: float = 0.1) -> Estimate:
        """Return one method's curve over another's at equal new loss, where the other one keeps at least ``least``."""
        curves = self.curves(kind, ours, read), self.curves(kind, theirs, read)
        return self._at_levels(kind, *curves, lambda one, other, at: ratio(one, other, at, least))

    def _at_levels(self, kind: Kind, ours: Curves, theirs: Curves, compare: Compare) -> Estimate:
        levels = self.levels(kind)
        both = ours.keys() & theirs.keys() & levels.keys()
        return by_task({cell: compare(ours[cell], theirs[cell], levels[cell]) for cell in ours if cell in both})

    def gain_kept(self, kind: Kind, whole: tuple[str, str], part: tuple[str, str]) -> Estimate:
        """Return the share of a fine-tune's gain in new loss that a part of it keeps: (base - part) / (base - whole).

        Args:
            kind: of runs.
            whole: method and setting of the fine-tune.
            part: of what keeps a part of it.
        """
        base, tuned, kept = (self.runs(kind, *arm) for arm in (("base", "-"), whole, part))
        return by_task(
            {
                cell: (new_loss(base[cell]) - new_loss(run)) / (new_loss(base[cell]) - new_loss(tuned[cell]))
                for cell, run in kept.items()
                if cell in base and cell in tuned
            }
        )

    def reach(self, kind: Kind, method: str) -> Estimate:
        """Return the share of levels that a method's curve reaches."""
        levels = self.levels(kind)
        curves = self.curves(kind, method, old)
        return by_task({cell: reached(curve, levels[cell]) for cell, curve in curves.items() if cell in levels})

    def difference(self, kind: Kind, ours: tuple[str, str], theirs: tuple[str, str], read: Read) -> Estimate:
        """Return ours less theirs, paired by cell."""
        a, b = self.runs(kind, *ours), self.runs(kind, *theirs)
        return by_task({cell: read(a[cell]) - read(b[cell]) for cell in a if cell in b})
