"""A summary as SVG, written by hand: heat map with a bar per layer beside it, and the mass curve.

Drawings are text without outside references. Colours of text and lines follow the reader's light or dark setting; names
are escaped; exact figures are in tooltips. Lengths are in pixels.
"""

import html
import math
from dataclasses import dataclass

from fisherkit import look
from fisherkit.methods.summary import MASS_POINTS, HeatMap, Row, Summary

STYLE = """
svg { font: 11px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; --ink: #1b1f24; --dim: #68707a; --line: #d5d9de;
  --paper: #ffffff; --bar: #31688e; --alarm: #c62828; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ed; --dim: #9aa3ad; --line: #3a4048; --paper: #16191d;
  --bar: #35b779; --alarm: #ff7b72; } }
svg text { fill: var(--ink); } svg text.dim { fill: var(--dim); } svg text.head { font-weight: 600; }
svg .paper { fill: var(--paper); } svg .bar { fill: var(--bar); } svg .line { stroke: var(--line); fill: none; }
svg .curve { stroke: var(--bar); stroke-width: 2; fill: none; } svg .missing { stroke: var(--dim); fill: none; }
svg rect { shape-rendering: crispEdges; } svg .dead { stroke: var(--alarm); fill: none; }
"""
Box = tuple[float, float, float]
"""Left, top and width; every box is a row high."""

_ROW = 15
_LETTER = 6.2  # mean width of a letter at 11 px
_LONGEST_LABEL = 42
_BARS = 240
_GAP = 26
_CURVE = (420, 220)
_CURVE_FROM = 1e-4


@dataclass(frozen=True)
class Drawing:
    """SVG elements and the size they take up, from (0, 0)."""

    body: str
    width: float
    height: float

    def standalone(self) -> str:
        """As an ``<svg>`` element without style or background: what goes into a page that has STYLE."""
        return _tag("svg", self.body, viewBox=f"0 0 {self.width:.0f} {self.height:.0f}", **_size(self))


def picture(summary: Summary) -> str:
    """A whole ``.svg`` file: headline, heat map and bars, mass curve."""
    parts = [layers(summary)] + ([mass_curve(summary)] if summary.mass() else [])
    pad, top = 16.0, 44.0
    width = max(*(part.width for part in parts), 7.0 * len(look.headline(summary))) + 2 * pad
    body = _text(pad, 26, look.headline(summary), css="head")
    for part in parts:
        body += _tag("g", part.body, transform=f"translate({pad:g} {top:g})")
        top += part.height + 24
    whole = Drawing(_tag("style", STYLE) + _tag("rect", css="paper", width="100%", height="100%") + body, width, top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + whole.standalone().replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )


def layers(summary: Summary) -> Drawing:
    """A line per layer: its cells of the heat map, then a bar as long as its share of the total."""
    heat, rows = summary.heat, summary.layers
    margin = 14 + _LETTER * max(len(_label(row)) for row in rows)
    cell = max(14.0, min(46.0, 420 / max(len(heat.modules), 1)))
    bars = margin + cell * len(heat.modules) + (_GAP if heat.modules else 0)
    names = look.short_names(heat.modules)
    header = 16 + 0.75 * _LETTER * max((len(name) for name in names.values()), default=0)
    body = "".join(_heading(margin + cell * (at + 0.5), header, names[name], name) for at, name in enumerate(names))
    measure = "density" if heat.linear else "share of the total"
    body += _text(bars, header - 8, measure, css="dim")
    for at, row in enumerate(rows):
        y = header + at * _ROW
        body += _text(margin - 8, y + 11, _label(row), title=row.name, **{"text-anchor": "end"})
        body += _cells(heat, row, margin, y, cell) + _bar(summary, row, bars, y)
    bottom = header + _ROW * len(rows)
    if heat.means:
        body += _legend(heat, margin, bottom + 16)
        bottom += 50
    return Drawing(body, max(bars + _BARS + 60, margin + 470), bottom)


def mass_curve(summary: Summary) -> Drawing:
    """What share of the sum the largest x of all weights hold; x is on a log scale."""
    left, top, (width, height) = 56.0, 22.0, _CURVE
    decades = -math.log10(_CURVE_FROM)

    def x(share: float) -> float:
        return left + width * (1 + math.log10(share) / decades)

    def y(share: float) -> float:
        return top + height * (1 - share)

    body = _text(left, 12, "share of the total held by the largest weights", css="dim")
    for share in (0, 0.25, 0.5, 0.75, 1):
        body += _line(left, y(share), left + width, y(share))
        body += _text(left - 8, y(share) + 4, f"{100 * share:.0f} %", **{"text-anchor": "end"})
    for power in range(round(decades) + 1):
        share = _CURVE_FROM * 10**power
        body += _line(x(share), top, x(share), top + height)
        body += _text(x(share), top + height + 16, f"{100 * share:g} %", **{"text-anchor": "middle"})
    body += _text(left + width / 2, top + height + 34, "of all weights, largest first", **{"text-anchor": "middle"})
    tops = [_CURVE_FROM ** (1 - step / 120) for step in range(121)]
    points = " ".join(f"{x(share):.1f},{y(summary.histogram.mass(share)):.1f}" for share in tops)
    body += _tag("polyline", css="curve", points=points)
    for share in MASS_POINTS:
        held = summary.histogram.mass(share)
        told = f"top {100 * share:g} %: {look.percent(held)}"
        body += _tag("circle", _title(told), css="bar", cx=f"{x(share):.1f}", cy=f"{y(held):.1f}", r=4)
        below = y(held) + 18 if held > 0.15 else y(held) - 10
        body += _text(x(share) + 6, below, look.percent(held), title=told)
    return Drawing(body, left + width + 70, top + height + 42)


# Pieces of the heat map and its bars


def _label(row: Row) -> str:
    label = look.row_label(row, "layer")
    return label if len(label) <= _LONGEST_LABEL else f"…{label[1 - _LONGEST_LABEL :]}"


def _heading(x: float, y: float, short: str, name: str) -> str:
    return _text(0, 0, short, title=name, transform=f"translate({x:.1f} {y - 6:.1f}) rotate(-40)")


def _cells(heat: HeatMap, row: Row, x: float, y: float, width: float) -> str:
    if row.layer is None:
        return ""
    layer = row.layer
    return "".join(_cell(heat, layer, name, (x + at * width, y, width)) for at, name in enumerate(heat.modules))


def _cell(heat: HeatMap, layer: int, module: str, box: Box) -> str:
    place = f"layer {layer}, {module}"
    mean, level = heat.means.get((layer, module)), heat.level(layer, module)
    if mean is None:
        return _mark("missing", box, f"{place}: no such tensor")
    if level is None:
        return _mark("dead", box, f"{place}: all zero")
    return _box(box, _hex(level), f"{place}: {'density' if heat.linear else 'mean'} {look.number(mean)}")


def _box(box: Box, fill: str, title: str) -> str:
    x, y, width = box
    return _tag("rect", _title(title), x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=_ROW, fill=fill)


def _mark(kind: str, box: Box, title: str) -> str:
    """What stands in the place of a colour: a dash for a missing tensor, a cross for one that is zero throughout."""
    x, y, width = box
    middle, centre = y + _ROW / 2, x + width / 2
    paths = {
        "missing": f"M{centre - 4:.1f} {middle:.1f}h8",
        "dead": f"M{centre - 4:.1f} {middle - 4:.1f}l8 8m0 -8l-8 8",
    }
    return _box(box, "transparent", title) + _tag("path", css=kind, d=paths[kind])


def _bar(summary: Summary, row: Row, x: float, y: float) -> str:
    linear = summary.heat.linear
    longest = 1.0 if linear else max((one.share for one in summary.layers if math.isfinite(one.share)), default=0.0)
    value = row.mean if linear else row.share
    if not math.isfinite(value) or not longest:
        return _text(x, y + 11, "-", css="dim")
    length = _BARS * value / longest
    told = f"{row.name}: sum {look.number(row.sum)}, mean {look.number(row.mean)}"
    bar = _tag("rect", _title(told), css="bar", x=f"{x:.1f}", y=y + 2, width=f"{max(length, 0.5):.1f}", height=_ROW - 4)
    return bar + _text(x + length + 6, y + 11, look.percent(value), css="dim", title=told)


def _legend(heat: HeatMap, x: float, y: float) -> str:
    low, high = ("none", "none") if heat.bounds is None else map(look.number, heat.bounds)
    body = _text(x, y + 11, low)
    start = x + _LETTER * len(low) + 8
    body += "".join(_box((start + 3 * step, y, 3), _hex(step / 39), "") for step in range(40))
    body += _text(start + 126, y + 11, f"{high}   {'density' if heat.linear else 'mean per weight, log scale'}")
    body += _mark("missing", (x, y + 16, 12), "") + _text(x + 16, y + 27, "no such tensor", css="dim")
    return body + _mark("dead", (x + 110, y + 16, 12), "") + _text(x + 126, y + 27, "all zero", css="dim")


# Elements


def _tag(name: str, inside: str = "", css: str = "", **attributes: object) -> str:
    """An element; ``inside`` is markup, attributes are escaped."""
    given = ({"class": css} if css else {}) | attributes
    listed = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    return f"<{name}{listed}>{inside}</{name}>"


def _title(text: str) -> str:
    return f"<title>{html.escape(look.printable(text))}</title>" if text else ""


def _text(x: float, y: float, text: str, *, css: str = "", title: str = "", **attributes: object) -> str:
    inside = _title(title) + html.escape(look.printable(text))
    return _tag("text", inside, css, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return _tag("path", css="line", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")


def _hex(level: float) -> str:
    red, green, blue = look.colour(level)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _size(drawing: Drawing) -> dict[str, str]:
    return {"width": f"{drawing.width:.0f}", "height": f"{drawing.height:.0f}"}
