"""Charts of layers: maps of layers x modules side by side, and a bar per layer, all with one set of labels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fisherkit.render import formatting
from fisherkit.render.svg import LETTER, Colours, Drawing, colour, scale, tag, text, tooltip

Box = tuple[float, float, float]
"""Left, top and width; every box is a row high."""
Mark = Literal["missing", "dead"]

_ROW = 15
_LONGEST_LABEL = 42
_BARS = 240
_GAP = 26


@dataclass(frozen=True)
class Cell:
    """A cell of a map: a level from 0 to 1 or a mark, and what its tooltip says."""

    shown: float | Mark
    tooltip_text: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

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
    value: float = math.nan
    tooltip_text: str = ""


@dataclass(frozen=True, kw_only=True)
class Map:
    """Cells of layers x modules, and the scale of their colours.

    Attributes:
        modules: left to right.
        cell: what a layer has of a module.
        low: end of the scale that has level 0.
        high: end of the scale that has level 1.
        measure: of the scale.
        marks: that stand in the place of a colour, and what they mean.
        title: above the map.
        colours: of levels.
    """

    modules: Sequence[str]
    cell: Callable[[int, str], Cell]
    low: str
    high: str
    measure: str
    marks: Sequence[tuple[Mark, str]] = ()
    title: str = ""
    colours: Colours = formatting.colour


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar per line: what bars are long, and the value of a bar of full length."""

    measure: str
    longest: float


def chart(lines: Sequence[Line], maps: Sequence[Map], bars: Bars | None = None) -> Drawing:
    """Draw maps side by side over the same lines, and a bar per line at their right.

    Args:
        lines: top to bottom.
        maps: left to right; those without modules are left out. What their scale says stands below each.
        bars: of the lines; None for none.
    """
    maps = [one for one in maps if one.modules]
    margin = 14 + LETTER * max((len(_clipped(line.label)) for line in lines), default=0)
    header = _header(maps)
    bottom = header + _ROW * len(lines)
    body = "".join(_label(line, margin - 8, header + at * _ROW) for at, line in enumerate(lines))
    x = widest = margin
    for one in maps:
        width = _cell_width(one, len(maps))
        body += _map(lines, one, (x, header, width)) + _legend(one, x, bottom + 16)
        widest = max(widest, x + _legend_width(one))
        x += max(width * len(one.modules), _legend_width(one) if len(maps) > 1 else 0) + _GAP
    if bars is not None:
        body += text(x, header - 8, bars.measure, css="dim")
        body += "".join(_bar(line, bars, x, header + at * _ROW) for at, line in enumerate(lines))
        x += _BARS + 60
    return Drawing(body, max(x, widest), bottom + (50 if maps else 0))


def _header(maps: Sequence[Map]) -> float:
    """Return the height of titles and slanted names above the first line."""
    longest = max((len(name) for one in maps for name in formatting.short_names(one.modules).values()), default=0)
    return 16 + 0.75 * LETTER * longest + (18 if any(one.title for one in maps) else 0)


def _cell_width(one: Map, count: int) -> float:
    room, most = (420, 46.0) if count == 1 else (300, 42.0)
    return max(14.0, min(most, room / len(one.modules)))


def _map(lines: Sequence[Line], one: Map, box: Box) -> str:
    x, header, width = box
    names = formatting.short_names(one.modules)
    body = text(x, 12, one.title, css="head") if one.title else ""
    body += "".join(_heading(x + width * (at + 0.5), header, names[name], name) for at, name in enumerate(names))
    for at, line in enumerate(lines):
        if line.layer is not None:
            cells = (one.cell(line.layer, module) for module in one.modules)
            y = header + at * _ROW
            body += "".join(_drawn(cell, (x + n * width, y, width), one.colours) for n, cell in enumerate(cells))
    return body


def _label(line: Line, x: float, y: float) -> str:
    return text(x, y + 11, _clipped(line.label), title=line.name, **{"text-anchor": "end"})


def _clipped(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"…{label[1 - _LONGEST_LABEL :]}"


def _heading(x: float, y: float, short: str, name: str) -> str:
    return text(0, 0, short, title=name, transform=f"translate({x:.1f} {y - 6:.1f}) rotate(-40)")


def _drawn(cell: Cell, box: Box, colours: Colours) -> str:
    if isinstance(cell.shown, str):
        return _mark(cell.shown, box, cell.tooltip_text)
    return _box(box, colour(cell.shown, colours), cell.tooltip_text)


def _box(box: Box, fill: str, title: str) -> str:
    x, y, width = box
    return tag("rect", tooltip(title), x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=_ROW, fill=fill)


def _mark(kind: Mark, box: Box, title: str) -> str:
    """Draw a dash for a missing tensor, and a cross for one without anything to show."""
    x, y, width = box
    middle, centre = y + _ROW / 2, x + width / 2
    paths = {
        "missing": f"M{centre - 4:.1f} {middle:.1f}h8",
        "dead": f"M{centre - 4:.1f} {middle - 4:.1f}l8 8m0 -8l-8 8",
    }
    return _box(box, "transparent", title) + tag("path", css=kind, d=paths[kind])


def _legend(one: Map, x: float, y: float) -> str:
    body = scale(x, y, one.low, one.high, one.measure, one.colours)
    for kind, meaning in one.marks:
        body += _mark(kind, (x, y + 16, 12), "") + text(x + 16, y + 27, meaning, css="dim")
        x += 32 + LETTER * len(meaning)
    return body


def _legend_width(one: Map) -> float:
    strip = LETTER * (len(one.low) + len(one.high) + len(one.measure) + 3) + 134
    return max(strip, sum(32 + LETTER * len(meaning) for _, meaning in one.marks))


def _bar(line: Line, bars: Bars, x: float, y: float) -> str:
    if not math.isfinite(line.value) or not bars.longest:
        return text(x, y + 11, "-", css="dim", title=line.tooltip_text)
    length = _BARS * line.value / bars.longest
    size = {"width": f"{max(length, 0.5):.1f}", "height": _ROW - 4}
    bar = tag("rect", tooltip(line.tooltip_text), css="bar", x=f"{x:.1f}", y=y + 2, **size)
    return bar + text(x + length + 6, y + 11, formatting.percent(line.value), css="dim", title=line.tooltip_text)
