"""What fapm kept, as SVG: |delta| against |W| with the cut drawn in, and kept energy per layer and module."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherkit.kernels.density import HIGH, LOW, DensityMap
from fisherkit.methods.merge.fapm_report import FapmReport
from fisherkit.render import fapm_view, formatting, svg
from fisherkit.render.fapm_view import PER_OCTAVE, Curve, Energy, Group, Window
from fisherkit.render.svg import Cell, Drawing, Legend, Line

_OCTAVE = 48.0  # pixels, at most
_WIDEST = 880  # pixels that both panels take up together, at most
_SHADES = 32
_LEFT, _TOP, _GAP, _ROW = 56.0, 30.0, 56.0, 18


def picture(report: FapmReport) -> str:
    """A whole ``.svg`` file: headline, density, kept energy."""
    parts = [] if report.map is None else [density(report.map)]
    return svg.picture(fapm_view.headline(report), [*parts, layers(report)])


def layers(report: FapmReport) -> Drawing:
    """A line per layer: its modules' kept energy as cells, then a bar as long as its own."""
    energy = fapm_view.energy_of(report)
    shares = (group.share for group in energy.layers if math.isfinite(group.share))
    low, high = ("none", "none") if energy.bounds is None else map(formatting.percent, energy.bounds)
    return svg.chart(
        [_line(group) for group in energy.layers],
        energy.modules,
        lambda layer, module: _cell(energy, layer, module),
        measure="share of the squared delta kept",
        longest=max(shares, default=0.0),
        legend=Legend(
            low=low,
            high=high,
            measure=energy.measure,
            marks=(("missing", "no such tensor"), ("dead", "not changed by fine-tuning")),
        ),
    )


def _line(group: Group) -> Line:
    label = group.name if group.layer is None else str(group.layer)
    return Line(label=label, name=group.name, layer=group.layer, value=group.share, tooltip_text=group.tooltip_text())


def _cell(energy: Energy, layer: int, module: str) -> Cell:
    group, level = energy.cells.get((layer, module)), energy.level(layer, module)
    if group is None:
        return Cell("missing", f"layer {layer}, {module}: no such tensor")
    return Cell("dead" if level is None else level, group.tooltip_text())


# The density


@dataclass(frozen=True)
class _Frame:
    """Where powers of two lie in a panel; ``octave`` is in pixels."""

    window: Window
    octave: float

    @property
    def width(self) -> float:
        return self.octave * (self.window.right - self.window.left)

    @property
    def bottom(self) -> float:
        return _TOP + self.octave * (self.window.top - self.window.bottom)

    def x(self, power: float) -> float:
        return _LEFT + self.octave * (power - self.window.left)

    def y(self, power: float) -> float:
        return self.bottom - self.octave * (power - self.window.bottom)


def density(found: DensityMap) -> Drawing:
    """All entries, and beside them those that were kept, with the cut in both."""
    window = fapm_view.window_of(found)
    frame = _Frame(window, min(_OCTAVE, _WIDEST / 2 / (window.right - window.left)))
    curves = fapm_view.curves_of(found, window)
    body = _panel(found, found.entries, frame, curves)
    width = _LEFT + frame.width
    if found.kept.any():
        second = _panel(found, found.kept, frame, curves)
        body += svg.tag("g", second, transform=f"translate({frame.width + _GAP:g} 0)")
        width += frame.width + _GAP
    return Drawing(body + _legend(found, frame, curves), max(width + 24, 660.0), frame.bottom + 74 + _ROW * len(curves))


def _panel(found: DensityMap, counts: NDArray[np.float64], frame: _Frame, curves: list[Curve]) -> str:
    """One density in its axes; that of kept entries lies on the outline of all."""
    shown = _shades(counts[frame.window.cells], *_bounds(found))
    if counts is found.entries:
        title, turned = "all entries that changed", f"translate(14 {(_TOP + frame.bottom) / 2:.1f}) rotate(-90)"
        body = svg.text(0, 0, fapm_view.y_label(found.metric), transform=turned, **{"text-anchor": "middle"})
    else:
        title, body = "those that were kept", ""
        shown = _squares(found.entries[frame.window.cells] > 0, css="shade") + shown
    body += svg.text(_LEFT, _TOP - 10, f"{title}: about {formatting.count(round(counts.sum()))}", css="head")
    body += svg.text(_LEFT + frame.width / 2, frame.bottom + 36, fapm_view.X_LABEL, **{"text-anchor": "middle"})
    cell = frame.octave / PER_OCTAVE
    placed = f"translate({_LEFT:g} {frame.bottom:g}) scale({cell:g} {-cell:g})"
    body += _grid(frame) + svg.tag("g", shown, css="cells", transform=placed)
    return body + "".join(_curve(curve, frame) for curve in curves) + _tooltips(found, frame)


def _grid(frame: _Frame) -> str:
    """A line and its power of two at every second octave."""
    window, body = frame.window, ""
    for power in fapm_view.ticks(window.left, window.right):
        body += svg.line(frame.x(power), _TOP, frame.x(power), frame.bottom)
        body += svg.text(frame.x(power), frame.bottom + 16, fapm_view.power(power), **{"text-anchor": "middle"})
    for power in fapm_view.ticks(window.bottom, window.top):
        body += svg.line(_LEFT, frame.y(power), _LEFT + frame.width, frame.y(power))
        body += svg.text(_LEFT - 8, frame.y(power) + 4, fapm_view.power(power), **{"text-anchor": "end"})
    return body


def _bounds(found: DensityMap) -> tuple[float, float]:
    filled = found.entries[found.entries > 0]
    return (float(filled.min()), float(filled.max())) if filled.size else (1.0, 1.0)


def _shades(counts: NDArray[np.float64], low: float, high: float) -> str:
    """Cells in as many colours as the eye tells apart, one path each: a tenth of the size of as many rectangles."""
    span = math.log(high / low) or 1.0
    levels = np.full(counts.shape, -1)
    filled = counts > 0
    levels[filled] = np.rint(np.clip(np.log(counts[filled] / low) / span, 0, 1) * (_SHADES - 1))
    return "".join(_squares(levels == shade, fill=svg.colour(shade / (_SHADES - 1))) for shade in range(_SHADES))


def _squares(flags: NDArray[np.bool_], *, css: str = "", fill: str = "") -> str:
    """Flagged cells as one path in units of cells; neighbours in a row are one stroke."""
    edges = np.diff(np.pad(flags, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges > 0), np.argwhere(edges < 0)
    path = "".join(f"M{x} {y}h{end - x}v1H{x}z" for (y, x), (_, end) in zip(starts, ends, strict=True))
    return svg.tag("path", css=css, d=path, **({"fill": fill} if fill else {})) if path else ""


def _curve(curve: Curve, frame: _Frame) -> str:
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in curve.points)
    drawn = svg.tag("polyline", svg.tooltip(curve.tooltip_text), css=_css(curve), points=points)
    return svg.tag("polyline", css="halo", points=points) + drawn


def _css(curve: Curve) -> str:
    return "cut second" if curve.second else "cut"


def _tooltips(found: DensityMap, frame: _Frame) -> str:
    """What every octave of |W| and |delta| holds, for the pointer."""
    window, body = frame.window, ""
    for y in range(window.bottom, window.top):
        for x in range(window.left, window.right):
            block = Window(x, x + 1, y, y + 1).cells
            entries = float(found.entries[block].sum())
            if entries:
                tooltip_text = (
                    f"|W| {_range(x)}, |delta| {_range(y)}: about {formatting.count(round(entries))} entries, "
                )
                tooltip_text += f"{formatting.percent(float(found.kept[block].sum()) / entries)} kept"
                square = f"M{frame.x(x):g} {frame.y(y + 1):g}h{frame.octave:g}v{frame.octave:g}h{-frame.octave:g}z"
                body += svg.tag("path", svg.tooltip(tooltip_text), d=square, fill="transparent")
    return body


def _range(octave: int) -> str:
    """The outermost octaves hold what lies beyond them as well."""
    if octave == LOW:
        return f"below {fapm_view.power(octave + 1)}"
    return (
        f"above {fapm_view.power(octave)}"
        if octave + 1 == HIGH
        else f"{fapm_view.power(octave)} to {fapm_view.power(octave + 1)}"
    )


def _legend(found: DensityMap, frame: _Frame, curves: list[Curve]) -> str:
    low, high = (formatting.count(max(1, round(bound))) for bound in _bounds(found))
    y = frame.bottom + 52
    outside = f"; {formatting.percent(fapm_view.beyond(found, frame.window))} of the entries lie beyond these axes"
    body = svg.scale(_LEFT, y, low, high, f"entries per cell, log scale{outside}")
    for at, curve in enumerate(curves, start=1):
        middle = y + _ROW * at + 8
        body += svg.tag("path", css=_css(curve), d=f"M{_LEFT:g} {middle:g}h26")
        body += svg.text(_LEFT + 34, middle + 4, curve.tooltip_text)
    return body
