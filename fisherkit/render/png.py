"""Summaries as PNG, through matplotlib: of one file, of the comparison of two, and of the insides of a mask."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherkit.methods.inspect.compare import Overlap
from fisherkit.methods.inspect.heat_map import HeatMap, positive_bounds
from fisherkit.methods.inspect.mask_bands import Bands
from fisherkit.methods.inspect.summary import Summary
from fisherkit.render import formatting, summary_text, svg_bands, svg_compare, svg_summary
from fisherkit.render.png_pieces import BAR, draw_bars, draw_map, encoded, in_percent, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

_BLANK = "(blank: none or zero)"


def summary_png(summary: Summary, bands: Sequence[Bands] = ()) -> bytes:
    """Return the figure of a summary as a PNG file: the same drawings as its page, in the same units.

    Args:
        summary: of one file, or of the comparison of two.
        bands: of a mask, see mask_bands.
    """
    heights = _heights(summary, bands)
    sentences = summary_text.sentences(summary, bands=bool(bands))
    figure = new_figure(13, sum(heights) + 0.4 + 0.2 * len(sentences), summary_text.headline(summary), sentences)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    parts = iter(range(len(heights)))
    if summary.other is not None:
        _compare(figure, grid[next(parts)], summary)
        if svg_compare.has_scatter(summary):
            _scatter_and_curves(figure, grid[next(parts)], summary)
    elif not (bands and summary.heat.is_flat):
        _one_file(figure, grid[next(parts)], summary)
    if bands:
        _bands(figure, grid[next(parts)], bands)
    return encoded(figure)


def _heights(summary: Summary, bands: Sequence[Bands]) -> list[float]:
    """Return the inches of each part of the figure, top to bottom."""
    of_layers = max(4.0, 1.6 + 0.17 * len(summary.layers))
    heights = [] if summary.other is None and bands and summary.heat.is_flat else [of_layers]
    if summary.other is not None and svg_compare.has_scatter(summary):
        heights.append(5.0)
    return [*heights, 3.2 * -(-len(bands) // 4)] if bands else heights


def _one_file(figure: "Figure", place: "SubplotSpec", summary: Summary) -> None:
    """Draw the map, the bars and the mass curve."""
    heat, known = summary.heat, bool(summary.mass())
    grid = place.subgridspec(1, 3 if known else 2, width_ratios=(2, 1.5, 1.5)[: 3 if known else 2])
    _draw_heat(figure.add_subplot(grid[0]), heat, heat.measure if heat.linear else "mean per weight, log scale")
    labels = [summary_text.row_label(row, "layer") for row in summary.layers]
    shares = [row.mean if heat.linear else row.share for row in summary.layers]
    title = heat.measure if heat.linear else "share of the total"
    draw_bars(figure.add_subplot(grid[1]), labels, shares, title=title, most=1.0 if heat.linear else None)
    if known:
        _curves(figure.add_subplot(grid[2]), summary)


def _draw_heat(axes: "Axes", heat: HeatMap, title: str, bounds: tuple[float, float] | None = None) -> None:
    levels = [[heat.level(layer, module, bounds) for module in heat.modules] for layer in heat.layers]
    ends = [svg_summary.end(heat, which, bounds) for which in (0, 1)] if bounds or heat.bounds else []
    labels = [heat.label(layer) for layer in heat.layers]
    draw_map(axes, levels, labels, heat.modules, ends, title=f"{title} {_BLANK}")


def _curves(axes: "Axes", summary: Summary) -> None:
    tops = [10 ** (-4 + step / 30) for step in range(121)]
    files = [summary] if summary.other is None else [summary, summary.other]
    names = ["this file"] if summary.other is None else list(summary_text.pair_names(summary))
    for one, name, style in zip(files, names, ("-", "--"), strict=False):
        axes.semilogx(tops, [one.histogram.mass(top) for top in tops], style, color=BAR, label=name)
    if len(files) > 1:
        axes.legend(fontsize=8)
    axes.set_title("share of the total held by the largest weights", fontsize=9)
    axes.set(xlabel="of all weights, largest first", ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        in_percent(axis)
    axes.grid(alpha=0.3)
    axes.set_box_aspect(0.6)
    axes.set_anchor("N")
    for top, held in summary.mass():
        axes.plot([top], [held], "o", color=BAR)
        axes.annotate(formatting.percent(held), (top, held), (6, -12), textcoords="offset points", fontsize=8)


def _compare(figure: "Figure", place: "SubplotSpec", summary: Summary) -> None:
    """Draw both maps on one scale, and the map of how they differ."""
    assert summary.other is not None
    here, there = summary.heat, summary.other.heat
    flat = here.is_flat and there.is_flat
    grid = place.subgridspec(1, 2 if here.linear and flat else 3)
    bounds = None if here.linear else positive_bounds([here, there])
    if not flat:
        for at, (heat, name) in enumerate(zip((here, there), summary_text.pair_names(summary), strict=True)):
            _draw_heat(figure.add_subplot(grid[at]), heat, name, bounds)
    axes = figure.add_subplot(grid[0 if flat else 2])
    difference = svg_compare.difference(summary)
    layers = sorted({*here.layers, *there.layers})
    cells = [[difference.cell(layer, module).shown for module in difference.modules] for layer in layers]
    levels = [[None if isinstance(shown, str) else shown for shown in row] for row in cells]
    draw_map(
        axes,
        levels,
        list(map(str, layers)),
        difference.modules,
        [difference.low, difference.high],
        title=difference.title,
        diverging=not here.linear,
    )
    if flat:
        overlaps = [row.agreement.jaccard if isinstance(row.agreement, Overlap) else math.nan for row in summary.layers]
        labels = [summary_text.row_label(row, "layer") for row in summary.layers]
        draw_bars(figure.add_subplot(grid[1]), labels, overlaps, title="Jaccard overlap", most=1.0)


def _scatter_and_curves(figure: "Figure", place: "SubplotSpec", summary: Summary) -> None:
    """Draw layers against layers, and both mass curves."""
    grid = place.subgridspec(1, 2)
    axes, pairs = figure.add_subplot(grid[0]), svg_compare.shared_layers(summary)
    ends = svg_compare.scatter_ends(pairs)
    one, two = summary_text.pair_names(summary)
    axes.plot(ends, ends, "--", color="grey", linewidth=1)
    shares = [[layer.share for layer in side] for side in zip(*pairs, strict=True)]
    points = axes.scatter(shares[1], shares[0], c=[here.layer for here, _ in pairs], cmap="viridis", edgecolors="white")
    for here, there in pairs:
        if here.layer in svg_compare.furthest(pairs):
            axes.annotate(str(here.layer), (there.share, here.share), (6, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"share in {two}", ylabel=f"share in {one}")
    axes.set_title("layers by their share of the total; equal on the dashed line", fontsize=9)
    axes.set_box_aspect(1)
    axes.grid(alpha=0.3)
    ticks = svg_compare.scatter_ticks(*ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks)
        axis.set_ticks([], minor=True)
        in_percent(axis)
    figure.colorbar(points, ax=axes, label="layer", aspect=40)
    if summary.mass():
        _curves(figure.add_subplot(grid[1]), summary)


def _bands(figure: "Figure", place: "SubplotSpec", bands: Sequence[Bands]) -> None:
    """Draw an image of layers x heads or bands per module, four abreast, on one scale."""
    grid = place.subgridspec(-(-len(bands) // 4), 4)
    layers, top = svg_bands.all_layers(bands), svg_bands.highest(bands)
    drawn = []
    for at, one in enumerate(bands):
        axes = figure.add_subplot(grid[at // 4, at % 4])
        levels = svg_bands.levels(one, layers, top)
        image = axes.imshow(levels, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(one.module, fontsize=9)
        axes.set_yticks([0, len(layers) - 1], [str(layers[0]), str(layers[-1])], fontsize=7)
        axes.set_xticks([])
        axes.set_xlabel(f"{levels.shape[1]} {svg_bands.AXES[one.axis]}, first to last", fontsize=8)
        drawn.append(axes)
    scale = figure.colorbar(image, ax=drawn, ticks=[0, 1], aspect=50)
    scale.ax.set_yticklabels(["0 %", formatting.percent(top)])
