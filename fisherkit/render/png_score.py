"""Picture of ``score`` as PNG, through matplotlib: the same panels, labels and front as in SVG."""

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fisherkit.methods.score.report import ScoreReport
from fisherkit.render import formatting, score_view, svg_score
from fisherkit.render.labels import place_labels
from fisherkit.render.png_pieces import CUT, encoded, new_figure
from fisherkit.render.score_view import Panel, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ALONE = "#1b1f24"
_LINE = 105  # characters above the picture that fit its width


def score_png(report: ScoreReport, more: Sequence[str] = ()) -> bytes:
    """Return the picture as a PNG file.

    Args:
        report: of score.
        more: sentences that belong to it, such as advice.
    """
    panels = score_view.panels(report)
    heights = [6.2 if panel.y_label else 1.1 + 0.33 * len(panel.points) for panel in panels]
    sentences = [score_view.headline(report), *score_view.sentences(report, more)]
    headline, *lines = (_plain(line) for sentence in sentences for line in textwrap.wrap(sentence, _LINE))
    figure = new_figure(9.2, sum(heights) + 0.4 + 0.2 * len(lines), headline, lines)
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for at, panel in enumerate(panels):
        axes = figure.add_subplot(grid[at])
        axes.grid(alpha=0.3)
        axes.set(xlim=panel.x_range, xlabel=_plain(panel.x_label))
        axes.set_xticks(score_view.ticks(*panel.x_range))
        (_plane if panel.y_label else _rows)(axes, panel)
    return encoded(figure)


def _plain(text: str) -> str:
    """Return words that matplotlib takes for no formula."""
    return formatting.printable(text).replace("$", r"\$")


def _plane(axes: "Axes", panel: Panel) -> None:
    axes.set(ylim=panel.y_range, ylabel=_plain(panel.y_label))
    axes.set_yticks(score_view.ticks(*panel.y_range))
    if panel.steps:
        axes.plot(*zip(*panel.steps, strict=True), color=CUT, linewidth=1.5, zorder=2)
    x, y = _pixels(panel.x_range, svg_score.WIDTH), _pixels(panel.y_range[::-1], svg_score.HEIGHT)
    places = []
    for point in panel.points:
        assert point.y is not None
        _draw(axes, point, point.y.value, point.y.half)
        places.append((x(point.x.value), y(point.y.value)))
    names, taken = [point.name for point in panel.points], score_view.strokes(panel, x, y)
    labels = place_labels(places, names, taken, svg_score.WIDTH, svg_score.HEIGHT)
    for point, place, label in zip(panel.points, places, labels, strict=True):
        assert point.y is not None
        axes.annotate(
            formatting.printable(label.words),
            (point.x.value, point.y.value),
            (label.left - place[0], place[1] - label.baseline),
            textcoords="offset points",
            fontsize=8,
            fontweight="bold" if point.is_best else "normal",
            parse_math=False,
        )


def _rows(axes: "Axes", panel: Panel) -> None:
    for at, point in enumerate(panel.points):
        _draw(axes, point, float(at), 0.0)
    axes.set_yticks(range(len(panel.points)), [_plain(point.name) for point in panel.points], fontsize=8)
    axes.set_ylim(len(panel.points) - 0.5, -0.5)


def _draw(axes: "Axes", point: Point, up: float, half: float) -> None:
    colour = _ALONE if point.level is None else [part / 255 for part in formatting.colour(point.level)]
    axes.errorbar(
        [point.x.value],
        [up],
        xerr=[point.x.half] if point.x.half else None,
        yerr=[half] if half else None,
        fmt="o",
        color=colour,
        ecolor="grey",
        elinewidth=0.8,
        markersize=7 if point.is_best else 5,
        zorder=3,
    )


def _pixels(ends: tuple[float, float], length: float) -> Callable[[float], float]:
    """Return the place of a value along an axis, in pixels of the SVG."""
    return lambda value: length * (value - ends[0]) / (ends[1] - ends[0])
