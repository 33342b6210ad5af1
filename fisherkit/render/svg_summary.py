"""A summary of one file as SVG: heat map with a bar per layer beside it, and the mass curve."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherkit.kernels.histogram import Histogram
from fisherkit.methods.inspect.heat_map import HeatMap
from fisherkit.methods.inspect.rows import SummaryRow
from fisherkit.methods.inspect.summary import MASS_POINTS, Summary
from fisherkit.render import formatting, summary_text, svg
from fisherkit.render.svg import Drawing
from fisherkit.render.svg_chart import Bars, Cell, Line, Map, Mark, chart

if TYPE_CHECKING:
    from fisherkit.methods.inspect.mask_bands import Bands as MaskBands

MARKS: tuple[tuple[Mark, str], ...] = (("missing", "no such tensor"), ("dead", "all zero"))

_CURVE = (420, 220)
_CURVE_FROM = 1e-4


def drawings(summary: Summary, bands: "Sequence[MaskBands]" = ()) -> list[Drawing]:
    """Return all drawings of one file or of the comparison of two, top to bottom.

    Args:
        summary: of a file.
        bands: of a mask, see mask_bands.
    """
    from fisherkit.render import svg_bands, svg_compare

    parts = [] if summary.other is None else svg_compare.drawings(summary)
    if summary.other is None and not (bands and summary.heat.is_flat):
        parts.append(layers(summary))
    parts += [svg_bands.bands(bands)] if bands else []
    return parts + ([mass_curve(summary)] if summary.mass() else [])


def picture(summary: Summary, bands: "Sequence[MaskBands]" = ()) -> str:
    """Return a whole ``.svg`` file: headline, sentences, and the drawings; see drawings."""
    return svg.picture(
        summary_text.headline(summary), drawings(summary, bands), summary_text.sentences(summary, bands=bool(bands))
    )


def layers(summary: Summary) -> Drawing:
    """Draw a line per layer: its cells of the heat map, then a bar as long as its share of the total."""
    heat = summary.heat
    shares = (row.share for row in summary.layers if math.isfinite(row.share))
    measure = heat.measure if heat.linear else "share of the total"
    bars = Bars(measure=measure, longest=1.0 if heat.linear else max(shares, default=0.0))
    return chart([line(row, heat) for row in summary.layers], [map_of(heat)], bars)


def map_of(heat: HeatMap, *, bounds: tuple[float, float] | None = None, title: str = "") -> Map:
    """Return the map of a file's means.

    Args:
        heat: the means.
        bounds: of a scale that several maps share; None for its own.
        title: above the map.
    """
    return Map(
        modules=heat.modules,
        cell=lambda layer, module: _cell(heat, layer, module, bounds),
        low=end(heat, 0, bounds),
        high=end(heat, 1, bounds),
        measure=heat.measure if heat.linear else "mean per weight, log scale",
        marks=MARKS,
        title=title,
    )


def end(heat: HeatMap, which: int, bounds: tuple[float, float] | None = None) -> str:
    """Return the low (0) or high (1) end of a map's scale as text; percents for shares."""
    ends = bounds or heat.bounds
    if ends is None:
        return "none"
    return formatting.percent(ends[which]) if heat.linear else formatting.number(ends[which])


def line(row: SummaryRow, heat: HeatMap) -> Line:
    """Return the line of a layer."""
    return Line(
        label=summary_text.row_label(row, "layer"),
        name=row.name,
        layer=row.layer,
        value=row.mean if heat.linear else row.share,
        tooltip_text=f"{row.name}: sum {formatting.number(row.sum)}, mean {formatting.number(row.mean)}",
    )


def _cell(heat: HeatMap, layer: int, module: str, bounds: tuple[float, float] | None) -> Cell:
    place = f"layer {layer}, {module}"
    mean, level = heat.means.get((layer, module)), heat.level(layer, module, bounds)
    if mean is None:
        return Cell("missing", f"{place}: no such tensor")
    if level is None:
        return Cell("dead", f"{place}: all zero")
    return Cell(
        level, f"{place}: {heat.measure} {formatting.percent(mean) if heat.linear else formatting.number(mean)}"
    )


def mass_curve(summary: Summary) -> Drawing:
    """Draw what share of the sum the largest x of all weights hold, of both files where two are compared."""
    left, top, (width, height) = 56.0, 22.0, _CURVE
    body = svg.text(left, 12, "share of the total held by the largest weights", css="dim")
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + height * (1 - share)
        body += svg.line(left, y, left + width, y)
        body += svg.text(left - 8, y + 4, f"{100 * share:.0f} %", **{"text-anchor": "end"})
    for power in range(round(-math.log10(_CURVE_FROM)) + 1):
        share = _CURVE_FROM * 10**power
        body += svg.line(_curve_x(share), top, _curve_x(share), top + height)
        body += svg.text(_curve_x(share), top + height + 16, f"{100 * share:g} %", **{"text-anchor": "middle"})
    middle = left + width / 2
    body += svg.text(middle, top + height + 34, "of all weights, largest first", **{"text-anchor": "middle"})
    bottom = top + height + 42
    if summary.other is not None and summary.other.mass():
        body += _curve(summary.other.histogram, css="curve second")
        for at, (name, css) in enumerate(zip(summary_text.pair_names(summary), ("curve", "curve second"), strict=True)):
            body += svg.line(left, bottom + 12 + 18 * at, left + 26, bottom + 12 + 18 * at, css)
            body += svg.text(left + 34, bottom + 16 + 18 * at, name)
        bottom += 40
    return Drawing(body + _curve(summary.histogram) + _points(summary.histogram), left + width + 70, bottom)


def _curve_x(share: float) -> float:
    return 56.0 + _CURVE[0] * (1 - math.log10(share) / math.log10(_CURVE_FROM))


def _curve_y(share: float) -> float:
    return 22.0 + _CURVE[1] * (1 - share)


def _curve(histogram: Histogram, css: str = "curve") -> str:
    tops = [_CURVE_FROM ** (1 - step / 120) for step in range(121)]
    points = " ".join(f"{_curve_x(share):.1f},{_curve_y(histogram.mass(share)):.1f}" for share in tops)
    return svg.tag("polyline", css=css, points=points)


def _points(histogram: Histogram) -> str:
    """Mark the shares that the sentences name."""
    body = ""
    for share in MASS_POINTS:
        held = histogram.mass(share)
        x, y, title = _curve_x(share), _curve_y(held), f"top {100 * share:g} %: {formatting.percent(held)}"
        body += svg.tag("circle", svg.tooltip(title), css="bar", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4)
        body += svg.text(x + 6, y + 18 if held > 0.15 else y - 10, formatting.percent(held), title=title)
    return body
