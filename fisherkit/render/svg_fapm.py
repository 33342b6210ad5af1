"""Figure of what fapm kept, as SVG: |delta| against |W| with the cut drawn in, and kept energy per layer and module."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherkit.kernels.density import HIGH, LOW, DensityMap
from fisherkit.methods.merge.fapm_report import FapmReport
from fisherkit.render import fapm_view, formatting, svg
from fisherkit.render.fapm_view import PER_OCTAVE, Curve, Energy, Group, Window
from fisherkit.render.svg import Drawing
from fisherkit.render.svg_chart import Bars, Cell, Line, Map, chart
from fisherkit.render.svg_pixels import shaded, squares

_OCTAVE = 48.0  # pixels, at most
_WIDEST = 880  # pixels that both panels take up together, at most
_LEFT, _TOP, _GAP, _ROW = 56.0, 30.0, 56.0, 18


def picture(report: FapmReport) -> str:
    """Return a whole ``.svg`` file: headline, density, kept energy."""
    parts = [] if report.map is None else [density(report.map)]
    return svg.picture(fapm_view.headline(report), [*parts, layers(report)], fapm_view.sentences(report))


def layers(report: FapmReport) -> Drawing:
    """Draw a line per layer: its modules' kept energy as cells, then a bar as long as its own."""
    energy = fapm_view.energy_of(report)
    shares = (group.share for group in energy.layers if math.isfinite(group.share))
    low, high = ("none", "none") if energy.bounds is None else map(formatting.percent, energy.bounds)
    cells = Map(
        modules=energy.modules,
        cell=lambda layer, module: _cell(energy, layer, module),
        low=low,
        high=high,
        measure=energy.measure,
        marks=(("missing", "no such tensor"), ("dead", "not changed by fine-tuning")),
    )
    bars = Bars(measure="share of the squared delta kept", longest=max(shares, default=0.0))
    return chart([_line(group) for group in energy.layers], [cells], bars)


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
    """Places of powers of two in a panel; ``octave`` is in pixels."""

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


def density(densities: DensityMap) -> Drawing:
    """Draw all entries, and beside them those that were kept, with the cut in both."""
    window = fapm_view.window_of(densities)
    frame = _Frame(window, min(_OCTAVE, _WIDEST / 2 / (window.right - window.left)))
    curves = fapm_view.curves_of(densities, window)
    body = _panel(densities, densities.entries, frame, curves)
    width = _LEFT + frame.width
    if densities.kept.any():
        second = _panel(densities, densities.kept, frame, curves)
        body += svg.tag("g", second, transform=f"translate({frame.width + _GAP:g} 0)")
        width += frame.width + _GAP
    return Drawing(
        body + _legend(densities, frame, curves), max(width + 24, 660.0), frame.bottom + 74 + _ROW * len(curves)
    )


def _panel(densities: DensityMap, counts: NDArray[np.float64], frame: _Frame, curves: list[Curve]) -> str:
    """Draw one density in its axes; that of kept entries lies on the outline of all."""
    shown = shaded(_levels(counts[frame.window.cells], *_bounds(densities)))
    if counts is densities.entries:
        title, turned = "all entries that changed", f"translate(14 {(_TOP + frame.bottom) / 2:.1f}) rotate(-90)"
        body = svg.text(0, 0, fapm_view.y_label(densities.metric), transform=turned, **{"text-anchor": "middle"})
    else:
        title, body = "those that were kept", ""
        shown = squares(densities.entries[frame.window.cells] > 0, css="shade") + shown
    body += svg.text(_LEFT, _TOP - 10, f"{title}: about {formatting.count(round(counts.sum()))}", css="head")
    body += svg.text(_LEFT + frame.width / 2, frame.bottom + 36, fapm_view.X_LABEL, **{"text-anchor": "middle"})
    cell = frame.octave / PER_OCTAVE
    placed = f"translate({_LEFT:g} {frame.bottom:g}) scale({cell:g} {-cell:g})"
    body += _grid(frame) + svg.tag("g", shown, css="cells", transform=placed)
    return body + "".join(_curve(curve, frame) for curve in curves) + _tooltips(densities, frame)


def _grid(frame: _Frame) -> str:
    """Draw a line and its power of two at every second octave."""
    window, body = frame.window, ""
    for power in fapm_view.ticks(window.left, window.right):
        body += svg.line(frame.x(power), _TOP, frame.x(power), frame.bottom)
        body += svg.text(frame.x(power), frame.bottom + 16, fapm_view.power(power), **{"text-anchor": "middle"})
    for power in fapm_view.ticks(window.bottom, window.top):
        body += svg.line(_LEFT, frame.y(power), _LEFT + frame.width, frame.y(power))
        body += svg.text(_LEFT - 8, frame.y(power) + 4, fapm_view.power(power), **{"text-anchor": "end"})
    return body


def _bounds(densities: DensityMap) -> tuple[float, float]:
    filled = densities.entries[densities.entries > 0]
    return (float(filled.min()), float(filled.max())) if filled.size else (1.0, 1.0)


def _levels(counts: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Return where counts lie between two, on a log scale; NaN where there are none."""
    span = math.log(high / low) or 1.0
    with np.errstate(divide="ignore"):
        return np.where(counts > 0, np.log(counts / low) / span, np.nan)


def _curve(curve: Curve, frame: _Frame) -> str:
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in curve.points)
    drawn = svg.tag("polyline", svg.tooltip(curve.tooltip_text), css=_css(curve), points=points)
    return svg.tag("polyline", css="halo", points=points) + drawn


def _css(curve: Curve) -> str:
    return "cut second" if curve.second else "cut"


def _tooltips(densities: DensityMap, frame: _Frame) -> str:
    """Say for the pointer what every octave of |W| and |delta| holds."""
    window, body = frame.window, ""
    for y in range(window.bottom, window.top):
        for x in range(window.left, window.right):
            block = Window(x, x + 1, y, y + 1).cells
            entries = float(densities.entries[block].sum())
            if entries:
                tooltip_text = (
                    f"|W| {_range(x)}, |delta| {_range(y)}: about {formatting.count(round(entries))} entries, "
                )
                tooltip_text += f"{formatting.percent(float(densities.kept[block].sum()) / entries)} kept"
                square = f"M{frame.x(x):g} {frame.y(y + 1):g}h{frame.octave:g}v{frame.octave:g}h{-frame.octave:g}z"
                body += svg.tag("path", svg.tooltip(tooltip_text), d=square, fill="transparent")
    return body


def _range(octave: int) -> str:
    """Name an octave; the outermost hold what lies beyond them as well."""
    if octave == LOW:
        return f"below {fapm_view.power(octave + 1)}"
    return (
        f"above {fapm_view.power(octave)}"
        if octave + 1 == HIGH
        else f"{fapm_view.power(octave)} to {fapm_view.power(octave + 1)}"
    )


def _legend(densities: DensityMap, frame: _Frame, curves: list[Curve]) -> str:
    low, high = (formatting.count(max(1, round(bound))) for bound in _bounds(densities))
    y = frame.bottom + 52
    outside = f"; {formatting.percent(fapm_view.beyond(densities, frame.window))} of the entries lie beyond these axes"
    body = svg.scale(_LEFT, y, low, high, f"entries per cell, log scale{outside}")
    for at, curve in enumerate(curves, start=1):
        middle = y + _ROW * at + 8
        body += svg.tag("path", css=_css(curve), d=f"M{_LEFT:g} {middle:g}h26")
        body += svg.text(_LEFT + 34, middle + 4, curve.tooltip_text)
    return body
