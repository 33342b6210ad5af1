"""Two files side by side as SVG: their maps on one scale, the map of ratios or overlaps, and layers against layers."""

import math
from collections.abc import Sequence

from fisherkit.methods.inspect.compare import Overlap
from fisherkit.methods.inspect.heat_map import Ratios, positive_bounds, ratios
from fisherkit.methods.inspect.rows import SummaryRow, grouped, row
from fisherkit.methods.inspect.summary import Summary
from fisherkit.render import formatting, summary_text, svg
from fisherkit.render.svg import Drawing
from fisherkit.render.svg_chart import Bars, Cell, Line, Map, chart
from fisherkit.render.svg_summary import map_of

_SIDE = 340.0  # pixels of the scatter's square
_LEFT, _TOP = 66.0, 24.0
_NAMED = 3  # layers that differ most carry their number


def drawings(summary: Summary) -> list[Drawing]:
    """Return the drawings that compare two files: maps, and the scatter of layers where shares differ."""
    return [maps(summary), *([scatter(summary)] if has_scatter(summary) else [])]


def has_scatter(summary: Summary) -> bool:
    """Tell if layers have shares to be held against each other; the densities of masks are in the maps."""
    return not summary.heat.linear and len(shared_layers(summary)) > 1


def maps(summary: Summary) -> Drawing:
    """Draw the maps of both files on one scale, then how they differ; masks of equal quotas have only the latter."""
    assert summary.other is not None
    here, there = summary.heat, summary.other.heat
    bounds = None if here.linear else positive_bounds([here, there])
    pair = [
        map_of(heat, bounds=bounds, title=name)
        for heat, name in zip((here, there), summary_text.pair_names(summary), strict=True)
    ]
    flat = here.is_flat and there.is_flat
    lines = [_line(layer) for layer in sorted({*here.layers, *there.layers})]
    bars = Bars(measure="Jaccard overlap", longest=1.0) if here.linear else None
    if bars is not None:
        lines = [_overlap_line(layer) for layer in summary.layers]
    return chart(lines, [*([] if flat else pair), difference(summary)], bars)


def difference(summary: Summary) -> Map:
    """Return the map of how two files differ: log ratios of means, or for masks the overlap of what may change."""
    assert summary.other is not None
    if summary.heat.linear:
        return _overlap_map(summary)
    return _ratio_map(ratios(summary.heat, summary.other.heat), summary)


def _line(layer: int) -> Line:
    return Line(label=str(layer), name=f"layer {layer}", layer=layer)


def _overlap_line(layer: SummaryRow) -> Line:
    value = layer.agreement.jaccard if isinstance(layer.agreement, Overlap) else math.nan
    label = summary_text.row_label(layer, "layer")
    return Line(label=label, name=layer.name, layer=layer.layer, value=value, tooltip_text=layer.name)


def _ratio_map(cells: Ratios, summary: Summary) -> Map:
    one, two = summary_text.pair_names(summary)
    most = f"{2**cells.bound:.3g}"

    def cell(layer: int, module: str) -> Cell:
        level, place = cells.level(layer, module), f"layer {layer}, {module}"
        if level is None:
            return Cell("missing", f"{place}: not in both, or all zero")
        value = cells.cells[layer, module]
        more, less = (one, two) if value >= 0 else (two, one)
        return Cell(level, f"{place}: {2 ** abs(value):.3g} times as much in {more} as in {less}")

    return Map(
        modules=cells.modules,
        cell=cell,
        low=f"1/{most}",
        high=most,
        measure="first / second, log scale",
        marks=(("missing", "not in both"),),
        title="ratio of means, totals made equal",
        colours=formatting.diverging,
    )


def _overlap_map(summary: Summary) -> Map:
    """Map the Jaccard overlap of two masks; see compare.Overlap."""
    inside = [entry for entry in summary.entries if entry.layer is not None]
    groups = grouped(inside, lambda entry: (entry.layer or 0, entry.module))
    rows = {cell: row("", entries, math.nan, summary.comparison) for cell, entries in groups.items()}

    def cell(layer: int, module: str) -> Cell:
        found, place = rows.get((layer, module)), f"layer {layer}, {module}"
        if found is None or not isinstance(found.agreement, Overlap) or math.isnan(found.agreement.jaccard):
            return Cell("missing", f"{place}: not in both, or nothing may change")
        overlap = found.agreement
        return Cell(overlap.jaccard, f"{place}: overlap {overlap.jaccard:.3f}, by chance {overlap.chance:.3f}")

    return Map(
        modules=summary.heat.modules,
        cell=cell,
        low="0",
        high="1",
        measure="Jaccard overlap",
        marks=(("missing", "not in both"),),
        title="overlap of what may change",
    )


# The scatter


def shared_layers(summary: Summary) -> list[tuple[SummaryRow, SummaryRow]]:
    """Return the rows of the blocks that both files have, where both shares are positive."""
    other = {} if summary.other is None else {one.layer: one for one in summary.other.layers}
    pairs = [(one, other[one.layer]) for one in summary.layers if one.layer is not None and one.layer in other]
    return [pair for pair in pairs if all(one.share > 0 for one in pair)]


def scatter_ends(pairs: Sequence[tuple[SummaryRow, SummaryRow]]) -> tuple[float, float]:
    """Return the ends of both axes of the scatter, as shares; a little room is left around the points."""
    shares = [one.share for pair in pairs for one in pair]
    return min(shares) / 1.25, max(shares) * 1.25


def scatter_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... times a power of ten between two shares; only powers of ten over many of them."""
    steps = (1,) if high / low > 300 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]


def furthest(pairs: Sequence[tuple[SummaryRow, SummaryRow]]) -> set[int | None]:
    """Return the numbers of the layers that lie furthest from the diagonal."""
    by_distance = sorted(pairs, key=lambda pair: -abs(math.log(pair[0].share / pair[1].share)))
    return {one.layer for one, _ in by_distance[:_NAMED]}


def scatter(summary: Summary) -> Drawing:
    """Draw every layer as a point: its share of the total in the second file, and upwards in the first."""
    pairs = shared_layers(summary)
    low, high = scatter_ends(pairs)
    one, two = summary_text.pair_names(summary)

    def place(share: float) -> float:
        return _SIDE * math.log(share / low) / math.log(high / low)

    body = svg.text(_LEFT, 12, "layers by their share of the total; equal on the dashed line", css="dim")
    for tick in scatter_ticks(low, high):
        x, y = _LEFT + place(tick), _TOP + _SIDE - place(tick)
        body += svg.line(x, _TOP, x, _TOP + _SIDE) + svg.line(_LEFT, y, _LEFT + _SIDE, y)
        body += svg.text(x, _TOP + _SIDE + 16, f"{100 * tick:g} %", **{"text-anchor": "middle"})
        body += svg.text(_LEFT - 8, y + 4, f"{100 * tick:g} %", **{"text-anchor": "end"})
    body += svg.line(_LEFT, _TOP + _SIDE, _LEFT + _SIDE, _TOP, "equal")
    middle = {"text-anchor": "middle"}
    body += svg.text(_LEFT + _SIDE / 2, _TOP + _SIDE + 34, f"share in {two}", **middle)
    turned = f"translate(12 {_TOP + _SIDE / 2:.1f}) rotate(-90)"
    body += svg.text(0, 0, f"share in {one}", transform=turned, **middle)
    named, deepest = furthest(pairs), max(here.layer or 0 for here, _ in pairs) or 1
    for here, there in pairs:
        x, y = _LEFT + place(there.share), _TOP + _SIDE - place(here.share)
        shares = f"{formatting.percent(here.share)} in {one}, {formatting.percent(there.share)} in {two}"
        title = svg.tooltip(f"layer {here.layer}: {shares}")
        fill = svg.colour((here.layer or 0) / deepest)
        body += svg.tag("circle", title, css="dot", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5, fill=fill)
        body += svg.text(x + 8, y + 4, str(here.layer), css="head") if here.layer in named else ""
    bottom = _TOP + _SIDE + 46
    body += svg.scale(_LEFT, bottom, str(pairs[0][0].layer), str(pairs[-1][0].layer), "layer")
    return Drawing(body, _LEFT + _SIDE + 40, bottom + 22)
