"""Pieces of SVG, written by hand: elements, colours, and a chart of layers x modules with a bar per layer.

Drawings are text without outside references. Colours of text and lines follow the reader's light or dark setting; names
are escaped; exact figures are in tooltips. Lengths are in pixels.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fisherkit.render import formatting

STYLE = """
svg { font: 11px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; --ink: #1b1f24; --dim: #68707a; --line: #d5d9de;
  --paper: #ffffff; --bar: #31688e; --alarm: #c62828; --cut: #d81b60; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ed; --dim: #9aa3ad; --line: #3a4048; --paper: #16191d;
  --bar: #35b779; --alarm: #ff7b72; --cut: #ff6090; } }
svg text { fill: var(--ink); } svg text.dim { fill: var(--dim); } svg text.head { font-weight: 600; }
svg .paper { fill: var(--paper); } svg .bar { fill: var(--bar); } svg .line { stroke: var(--line); fill: none; }
svg .curve { stroke: var(--bar); stroke-width: 2; fill: none; } svg .missing { stroke: var(--dim); fill: none; }
svg rect { shape-rendering: crispEdges; } svg .dead { stroke: var(--alarm); fill: none; }
svg .cells { shape-rendering: crispEdges; } svg .shade { fill: var(--line); }
svg .halo { stroke: var(--paper); stroke-width: 4; stroke-opacity: .7; fill: none; }
svg .cut { stroke: var(--cut); stroke-width: 2; fill: none; } svg .second { stroke-dasharray: 6 4; }
"""
LETTER = 6.2
"""Mean width of a letter at 11 px."""

Box = tuple[float, float, float]
"""Left, top and width; every box is a row high."""
Mark = Literal["missing", "dead"]

_ROW = 15
_LONGEST_LABEL = 42
_BARS = 240
_GAP = 26


@dataclass(frozen=True)
class Drawing:
    """SVG elements and the size they take up, from (0, 0)."""

    body: str
    width: float
    height: float

    def standalone(self) -> str:
        """As an ``<svg>`` element without style or background: what goes into a page that has STYLE."""
        size = {"width": f"{self.width:.0f}", "height": f"{self.height:.0f}"}
        return tag("svg", self.body, viewBox=f"0 0 {self.width:.0f} {self.height:.0f}", **size)


def picture(headline: str, parts: Sequence[Drawing]) -> str:
    """A whole ``.svg`` file: the headline, and the drawings below each other."""
    pad, top = 16.0, 44.0
    width = max(*(part.width for part in parts), 7.0 * len(headline)) + 2 * pad
    body = text(pad, 26, headline, css="head")
    for part in parts:
        body += tag("g", part.body, transform=f"translate({pad:g} {top:g})")
        top += part.height + 24
    whole = Drawing(tag("style", STYLE) + tag("rect", css="paper", width="100%", height="100%") + body, width, top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + whole.standalone().replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )


# The chart of layers


@dataclass(frozen=True)
class Cell:
    """A cell of the heat map: a level from 0 to 1 or a mark, and what its tooltip says."""

    shown: float | Mark
    tooltip_text: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the chart.

    Attributes:
        label: at its left.
        name: in full.
        layer: number of its block, None for what lies outside the blocks and so has no cells.
        value: what its bar is long; NaN for none.
        tooltip_text: the bar's tooltip.
    """

    label: str
    name: str
    layer: int | None
    value: float
    tooltip_text: str


@dataclass(frozen=True, kw_only=True)
class Legend:
    """The ends of the scale, what it measures, and what the marks mean."""

    low: str
    high: str
    measure: str
    marks: tuple[tuple[Mark, str], ...]


def chart(
    lines: Sequence[Line],
    modules: Sequence[str],
    cell: Callable[[int, str], Cell],
    *,
    measure: str,
    longest: float,
    legend: Legend,
) -> Drawing:
    """Cells of the heat map per layer and module, then a bar per layer.

    Args:
        lines: top to bottom.
        modules: left to right; without any, there are only bars.
        cell: what a layer has of a module.
        measure: what bars are long.
        longest: the value of a bar of full length.
        legend: of the heat map.
    """
    margin = 14 + LETTER * max((len(_clipped(line.label)) for line in lines), default=0)
    width = max(14.0, min(46.0, 420 / max(len(modules), 1)))
    bars = margin + width * len(modules) + (_GAP if modules else 0)
    names = formatting.short_names(modules)
    header = 16 + 0.75 * LETTER * max((len(name) for name in names.values()), default=0)
    body = "".join(_heading(margin + width * (at + 0.5), header, names[name], name) for at, name in enumerate(names))
    body += text(bars, header - 8, measure, css="dim")
    for at, line in enumerate(lines):
        y = header + at * _ROW
        body += text(margin - 8, y + 11, _clipped(line.label), title=line.name, **{"text-anchor": "end"})
        if line.layer is not None:
            cells = (cell(line.layer, module) for module in modules)
            body += "".join(_drawn(one, (margin + n * width, y, width)) for n, one in enumerate(cells))
        body += _bar(line, longest, bars, y)
    bottom = header + _ROW * len(lines)
    if modules:
        body += scale(margin, bottom + 16, legend.low, legend.high, legend.measure)
        body += _explained(legend.marks, margin, bottom + 32)
        bottom += 50
    return Drawing(body, max(bars + _BARS + 60, margin + 470), bottom)


def scale(x: float, y: float, low: str, high: str, measure: str) -> str:
    """A strip of all colours between the two ends that they stand for."""
    start = x + LETTER * len(low) + 8
    strip = "".join(_box((start + 3 * step, y, 3), colour(step / 39), "") for step in range(40))
    return text(x, y + 11, low) + strip + text(start + 126, y + 11, f"{high}   {measure}")


def _clipped(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"…{label[1 - _LONGEST_LABEL :]}"


def _heading(x: float, y: float, short: str, name: str) -> str:
    return text(0, 0, short, title=name, transform=f"translate({x:.1f} {y - 6:.1f}) rotate(-40)")


def _drawn(cell: Cell, box: Box) -> str:
    if isinstance(cell.shown, str):
        return _mark(cell.shown, box, cell.tooltip_text)
    return _box(box, colour(cell.shown), cell.tooltip_text)


def _box(box: Box, fill: str, title: str) -> str:
    x, y, width = box
    return tag("rect", tooltip(title), x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=_ROW, fill=fill)


def _mark(kind: Mark, box: Box, title: str) -> str:
    """What stands in the place of a colour: a dash for a missing tensor, a cross for one without anything to show."""
    x, y, width = box
    middle, centre = y + _ROW / 2, x + width / 2
    paths = {
        "missing": f"M{centre - 4:.1f} {middle:.1f}h8",
        "dead": f"M{centre - 4:.1f} {middle - 4:.1f}l8 8m0 -8l-8 8",
    }
    return _box(box, "transparent", title) + tag("path", css=kind, d=paths[kind])


def _explained(marks: Sequence[tuple[Mark, str]], x: float, y: float) -> str:
    body = ""
    for kind, meaning in marks:
        body += _mark(kind, (x, y, 12), "") + text(x + 16, y + 11, meaning, css="dim")
        x += 32 + LETTER * len(meaning)
    return body


def _bar(line: Line, longest: float, x: float, y: float) -> str:
    if not math.isfinite(line.value) or not longest:
        return text(x, y + 11, "-", css="dim", title=line.tooltip_text)
    length = _BARS * line.value / longest
    size = {"width": f"{max(length, 0.5):.1f}", "height": _ROW - 4}
    bar = tag("rect", tooltip(line.tooltip_text), css="bar", x=f"{x:.1f}", y=y + 2, **size)
    return bar + text(x + length + 6, y + 11, formatting.percent(line.value), css="dim", title=line.tooltip_text)


# Elements


def tag(name: str, inside: str = "", css: str = "", **attributes: object) -> str:
    """An element; ``inside`` is markup, attributes are escaped."""
    given = ({"class": css} if css else {}) | attributes
    listed = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    return f"<{name}{listed}>{inside}</{name}>"


def tooltip(tooltip_text: str) -> str:
    """What an element says when pointed at."""
    return f"<title>{html.escape(formatting.printable(tooltip_text))}</title>" if tooltip_text else ""


def text(x: float, y: float, words: str, *, css: str = "", title: str = "", **attributes: object) -> str:
    """Words, from their base line's left end; escaped."""
    inside = tooltip(title) + html.escape(formatting.printable(words))
    return tag("text", inside, css, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A thin line, as of a grid."""
    return tag("path", css="line", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")


def colour(level: float) -> str:
    """The colour of a level from 0 to 1."""
    red, green, blue = formatting.colour(level)
    return f"#{red:02x}{green:02x}{blue:02x}"
