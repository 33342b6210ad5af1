"""A summary as SVG: heat map with a bar per layer beside it, and the mass curve. See ``drawing`` for the pieces."""

import math

from fisherkit.methods.inspect.summary import MASS_POINTS, HeatMap, Summary, SummaryRow
from fisherkit.render import formatting, summary_text, svg
from fisherkit.render.svg import Cell, Drawing, Legend, Line

_CURVE = (420, 220)
_CURVE_FROM = 1e-4


def picture(summary: Summary) -> str:
    """A whole ``.svg`` file: headline, heat map and bars, mass curve."""
    return svg.picture(
        summary_text.headline(summary), [layers(summary)] + ([mass_curve(summary)] if summary.mass() else [])
    )


def layers(summary: Summary) -> Drawing:
    """A line per layer: its cells of the heat map, then a bar as long as its share of the total."""
    heat = summary.heat
    shares = (row.share for row in summary.layers if math.isfinite(row.share))
    low, high = ("none", "none") if heat.bounds is None else map(formatting.number, heat.bounds)
    return svg.chart(
        [_line(row, heat) for row in summary.layers],
        heat.modules,
        lambda layer, module: _cell(heat, layer, module),
        measure=heat.measure if heat.linear else "share of the total",
        longest=1.0 if heat.linear else max(shares, default=0.0),
        legend=Legend(
            low=low,
            high=high,
            measure=heat.measure if heat.linear else "mean per weight, log scale",
            marks=(("missing", "no such tensor"), ("dead", "all zero")),
        ),
    )


def _line(row: SummaryRow, heat: HeatMap) -> Line:
    return Line(
        label=summary_text.row_label(row, "layer"),
        name=row.name,
        layer=row.layer,
        value=row.mean if heat.linear else row.share,
        tooltip_text=f"{row.name}: sum {formatting.number(row.sum)}, mean {formatting.number(row.mean)}",
    )


def _cell(heat: HeatMap, layer: int, module: str) -> Cell:
    place = f"layer {layer}, {module}"
    mean, level = heat.means.get((layer, module)), heat.level(layer, module)
    if mean is None:
        return Cell("missing", f"{place}: no such tensor")
    if level is None:
        return Cell("dead", f"{place}: all zero")
    return Cell(level, f"{place}: {heat.measure} {formatting.number(mean)}")


def mass_curve(summary: Summary) -> Drawing:
    """What share of the sum the largest x of all weights hold; x is on a log scale."""
    left, top, (width, height) = 56.0, 22.0, _CURVE
    decades = -math.log10(_CURVE_FROM)

    def x(share: float) -> float:
        return left + width * (1 + math.log10(share) / decades)

    def y(share: float) -> float:
        return top + height * (1 - share)

    text, middle = svg.text, {"text-anchor": "middle"}
    body = text(left, 12, "share of the total held by the largest weights", css="dim")
    for share in (0, 0.25, 0.5, 0.75, 1):
        body += svg.line(left, y(share), left + width, y(share))
        body += text(left - 8, y(share) + 4, f"{100 * share:.0f} %", **{"text-anchor": "end"})
    for power in range(round(decades) + 1):
        share = _CURVE_FROM * 10**power
        body += svg.line(x(share), top, x(share), top + height)
        body += text(x(share), top + height + 16, f"{100 * share:g} %", **middle)
    body += text(left + width / 2, top + height + 34, "of all weights, largest first", **middle)
    tops = [_CURVE_FROM ** (1 - step / 120) for step in range(121)]
    points = " ".join(f"{x(share):.1f},{y(summary.histogram.mass(share)):.1f}" for share in tops)
    body += svg.tag("polyline", css="curve", points=points)
    for share in MASS_POINTS:
        held = summary.histogram.mass(share)
        tooltip_text = f"top {100 * share:g} %: {formatting.percent(held)}"
        point = {"cx": f"{x(share):.1f}", "cy": f"{y(held):.1f}", "r": 4}
        body += svg.tag("circle", svg.tooltip(tooltip_text), css="bar", **point)
        below = y(held) + 18 if held > 0.15 else y(held) - 10
        body += text(x(share) + 6, below, formatting.percent(held), title=tooltip_text)
    return Drawing(body, left + width + 70, top + height + 42)
