"""Picture of ``score`` as SVG: old against new, a point per checkpoint with its intervals, and the front."""

from collections.abc import Callable, Sequence

from fisherkit.methods.score.report import ScoreReport
from fisherkit.render import score_view, svg
from fisherkit.render.labels import place_labels
from fisherkit.render.score_view import Panel, Point
from fisherkit.render.svg import Drawing

WIDTH, HEIGHT = 560.0, 400.0
"""Of the axes of a panel of two sets, in pixels."""
_LEFT, _TOP, _ROW = 64.0, 14.0, 24.0
_MIDDLE, _END = {"text-anchor": "middle"}, {"text-anchor": "end"}

_Place = Callable[[float], float]


def picture(report: ScoreReport, more: Sequence[str] = ()) -> str:
    """Return a whole ``.svg`` file.

    Args:
        report: of score.
        more: sentences that belong to it, such as advice.
    """
    drawings = [panel(one) for one in score_view.panels(report)]
    return svg.picture(score_view.headline(report), drawings, score_view.sentences(report, more))


def panel(one: Panel) -> Drawing:
    """Draw one panel: points in the plane of two sets, or below each other on one."""
    return _plane(one) if one.y_label else _rows(one)


def _plane(one: Panel) -> Drawing:
    x, y = _along(_LEFT, WIDTH, one.x_range), _along(_TOP + HEIGHT, -HEIGHT, one.y_range)
    body = _x_axis(one, x, _TOP + HEIGHT)
    for tick in score_view.ticks(*one.y_range):
        body += svg.line(_LEFT, y(tick), _LEFT + WIDTH, y(tick))
        body += svg.text(_LEFT - 8, y(tick) + 4, f"{tick:g}", **_END)
    turned = f"translate(12 {_TOP + HEIGHT / 2:.1f}) rotate(-90)"
    body += svg.text(0, 0, one.y_label, transform=turned, **_MIDDLE)
    if one.steps:
        path = "L".join(f"{x(right):.1f} {y(up):.1f}" for right, up in one.steps)
        body += svg.tag("path", css="cut", d=f"M{path}")
    places = [(x(point.x.value), y(point.y.value)) for point in one.points if point.y is not None]
    body += "".join(_bars(point, x, y, place) for point, place in zip(one.points, places, strict=True))
    body += "".join(_dot(point, place) for point, place in zip(one.points, places, strict=True))
    names, taken = [point.name for point in one.points], score_view.strokes(one, x, y)
    labels = place_labels(places, names, taken, _LEFT + WIDTH + 60, _TOP + HEIGHT)
    for point, label in zip(one.points, labels, strict=True):
        body += svg.text(label.left, label.baseline, label.words, css="head" if point.is_best else "")
    return Drawing(body, _LEFT + WIDTH + 64, _TOP + HEIGHT + 44)


def _rows(one: Panel) -> Drawing:
    """Points of one set below each other, each with its name at the left."""
    longest = max((len(point.name) for point in one.points), default=0)
    left, bottom = max(_LEFT, 14 + svg.LETTER * longest), _TOP + _ROW * len(one.points)
    x = _along(left, WIDTH, one.x_range)
    body = _x_axis(one, x, bottom)
    for at, point in enumerate(one.points):
        place = (x(point.x.value), _TOP + _ROW * (at + 0.5))
        body += svg.text(left - 10, place[1] + 4, point.name, css="head" if point.is_best else "", **_END)
        body += _bars(point, x, None, place) + _dot(point, place)
    return Drawing(body, left + WIDTH + 24, bottom + 44)


def _along(start: float, length: float, ends: tuple[float, float]) -> _Place:
    low, high = ends
    return lambda value: start + length * (value - low) / (high - low)


def _x_axis(one: Panel, x: _Place, bottom: float) -> str:
    body = ""
    for tick in score_view.ticks(*one.x_range):
        body += svg.line(x(tick), _TOP, x(tick), bottom)
        body += svg.text(x(tick), bottom + 16, f"{tick:g}", **_MIDDLE)
    return body + svg.text((x(one.x_range[0]) + x(one.x_range[1])) / 2, bottom + 36, one.x_label, **_MIDDLE)


def _bars(point: Point, x: _Place, y: _Place | None, place: tuple[float, float]) -> str:
    """Intervals to the right and left, and up and down."""
    body, (across, up) = "", place
    if point.x.half:
        body += svg.line(x(point.x.value - point.x.half), up, x(point.x.value + point.x.half), up, "missing")
    if y is not None and point.y is not None and point.y.half:
        body += svg.line(across, y(point.y.value - point.y.half), across, y(point.y.value + point.y.half), "missing")
    return body


def _dot(point: Point, place: tuple[float, float]) -> str:
    fill = {} if point.level is None else {"fill": svg.colour(point.level)}
    css = "dot" if fill else "dot alone"
    size = {"cx": f"{place[0]:.1f}", "cy": f"{place[1]:.1f}", "r": 5.5 if point.is_best else 4}
    return svg.tag("circle", svg.tooltip(point.tooltip_text), css=css, **size, **fill)
