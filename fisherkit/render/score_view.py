"""What the picture of ``score`` shows: points, intervals, the front, ticks and words, for every form it is drawn in.

One panel per prompt set after the first: the loss on the first set to the right, that on the other upwards, so that
the lower left is best. An interval is that of the difference to the first checkpoint, paired by sample: the samples'
own differences, which all checkpoints share, are not in it.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fisherkit.kernels.front import front
from fisherkit.methods.score.report import CheckpointScore, ScoreReport
from fisherkit.render.labels import Box

_UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
_FAMILY_LEVELS = (0.45, 0.85, 0.15, 0.65, 0.3)
"""Places in the scale of colours; neighbours differ most."""


@dataclass(frozen=True)
class Figure:
    """A checkpoint's figure on one set, and half the width of its interval; 0 where there is none."""

    value: float
    half: float


@dataclass(frozen=True)
class Point:
    """One checkpoint in a panel.

    Attributes:
        name: of the checkpoint.
        level: of its colour, from 0 to 1; None for the colour of text.
        x: on the set to the right.
        y: on the set upwards; None in a panel of one set.
        is_best: on the front.
        tooltip_text: exact figures.
    """

    name: str
    level: float | None
    x: Figure
    y: Figure | None
    is_best: bool
    tooltip_text: str


@dataclass(frozen=True)
class Panel:
    """Points of two sets, or of one.

    Attributes:
        x_label: of the axis to the right.
        y_label: of the axis upwards; empty in a panel of one set, whose points stand below each other.
        points: in the order of the checkpoints.
        x_range: ends of the axis to the right.
        y_range: ends of the axis upwards.
        steps: corners (x, y) of the front's line, left to right; empty for fewer than two points on it.
    """

    x_label: str
    y_label: str
    points: Sequence[Point]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    steps: Sequence[tuple[float, float]]


def panels(report: ScoreReport) -> list[Panel]:
    """Return a panel for each set after the first, or one panel where there is but one set."""
    first, *others = report.sets
    return [_panel(report, first, other) for other in others] or [_panel(report, first, None)]


def headline(report: ScoreReport) -> str:
    """Say in one line what was scored."""
    count = len(report.checkpoints)
    return f"{count} checkpoint{'s' if count != 1 else ''} on {', '.join(report.sets)}: {_UNITS[report.measure]}"


def sentences(report: ScoreReport, more: Sequence[str] = ()) -> list[str]:
    """Say how to read the picture.

    Args:
        report: of score.
        more: sentences that belong to it, such as advice; they come first.
    """
    lines = [*more]
    if len(report.sets) > 1:
        lines.append("Lower left is better; no checkpoint beats those on the line.")
    if len(report.checkpoints) > 1:
        lines.append(f"Bars: 95 % intervals of the difference to {report.checkpoints[0].name}, paired by sample.")
    return lines


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about ``wanted`` round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.7 * rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * at, 12) for at in range(first, math.floor(high / step + 1e-9) + 1)]


def strokes(panel: Panel, x: Callable[[float], float], y: Callable[[float], float]) -> list[Box]:
    """Return the bars and the front's line of a panel as boxes, which labels keep clear of.

    Args:
        panel: of two sets.
        x: from a value to pixels, to the right.
        y: from a value to pixels, downwards.
    """
    boxes = [(x(a), y(b), x(c), y(d)) for (a, b), (c, d) in pairwise(panel.steps)]
    for point in panel.points:
        if point.y is not None:
            across, up = point.x.value, point.y.value
            boxes.append((x(across - point.x.half), y(up), x(across + point.x.half), y(up)))
            boxes.append((x(across), y(up + point.y.half), x(across), y(up - point.y.half)))
    return boxes


def _panel(report: ScoreReport, x_set: str, y_set: str | None) -> Panel:
    levels = _family_levels([one.name for one in report.checkpoints])
    drawn = [one for one in report.checkpoints if _is_known(report, one, x_set, y_set)]
    xs = [_figure(report, one, x_set) for one in drawn]
    ys = [_figure(report, one, y_set) if y_set is not None else None for one in drawn]
    places = [(x.value, y.value) if y is not None else (x.value,) for x, y in zip(xs, ys, strict=True)]
    best = front(places)
    points = [
        Point(one.name, levels[one.name], x, y, at in best, _told(report, one, x_set, y_set))
        for at, (one, x, y) in enumerate(zip(drawn, xs, ys, strict=True))
    ]
    unit = _UNITS[report.measure]
    return Panel(
        x_label=f"{x_set}: {unit}",
        y_label=f"{y_set}: {unit}" if y_set is not None else "",
        points=points,
        x_range=_range(xs),
        y_range=_range([y for y in ys if y is not None]) if y_set is not None else (0.0, float(len(points))),
        steps=_steps([places[at] for at in best]) if y_set is not None and len(best) > 1 else (),
    )


def _is_known(report: ScoreReport, one: CheckpointScore, *names: str | None) -> bool:
    return all(report.value(one, name)[0] is not None for name in names if name is not None)


def _figure(report: ScoreReport, one: CheckpointScore, name: str) -> Figure:
    value, change = report.value(one, name)[0], one.sets[name].change
    assert value is not None
    return Figure(value, change.ci95 or 0.0 if change is not None else 0.0)


def _steps(places: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Corners of the border of what the front's points beat."""
    corners = [(places[0][0], places[0][1])]
    for x, y in places[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return corners


def _range(figures: Sequence[Figure]) -> tuple[float, float]:
    """Return ends with room around values and intervals."""
    low = min((one.value - one.half for one in figures), default=0.0)
    high = max((one.value + one.half for one in figures), default=1.0)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _family_levels(names: Sequence[str]) -> dict[str, float | None]:
    """Colours by name: one for those that differ in a number at the end, that of text for all others."""
    family = {name: re.sub(r"[\s=]*[-+]?[\d.]+$", "", name) for name in names}
    large = [one for one in dict.fromkeys(family.values()) if list(family.values()).count(one) > 1 and one]
    levels = {one: _FAMILY_LEVELS[at % len(_FAMILY_LEVELS)] for at, one in enumerate(large)}
    return {name: levels.get(one) for name, one in family.items()}


def _told(report: ScoreReport, one: CheckpointScore, *names: str | None) -> str:
    """Figures of a checkpoint in words, for its tooltip."""
    parts = []
    for name in names:
        if name is None:
            continue
        value, change = report.value(one, name)[0], one.sets[name].change
        part = f"{name} {value:.6g}"
        if change is not None:
            width = f" ± {change.ci95:.2g}" if change.ci95 is not None else ""
            part += f" ({change.difference:+.4g}{width})"
        parts.append(part)
    return f"{one.name}: {', '.join(parts)}"
