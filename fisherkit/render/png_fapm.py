"""Figure of what fapm kept as PNG: density of all and of kept entries, map of kept energy, and bars."""

import math
from typing import TYPE_CHECKING, Any

from fisherkit.kernels.density import DensityMap
from fisherkit.methods.merge.fapm_report import FapmReport
from fisherkit.render import fapm_view, formatting
from fisherkit.render.fapm_view import Energy
from fisherkit.render.png_pieces import CUT, draw_bars, draw_map, encoded, new_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


def pruning_png(report: FapmReport) -> bytes:
    """Return the figure as a PNG file."""
    energy = fapm_view.energy_of(report)
    heights = [*([5.4] if report.map is not None else []), max(3.0, 1.6 + 0.17 * len(energy.layers))]
    figure = new_figure(12, sum(heights) + 0.6, fapm_view.headline(report), [fapm_view.asked_for(report)])
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    if report.map is not None:
        _draw_density(figure.add_subplot(grid[0, 0]), report.map, "all entries that changed")
        if report.map.kept.any():
            _draw_density(figure.add_subplot(grid[0, 1]), report.map, "those that were kept", only_kept=True)
    _draw_energy(figure.add_subplot(grid[-1, 0]), energy)
    labels = [group.name if group.layer is None else str(group.layer) for group in energy.layers]
    shares = [group.share for group in energy.layers]
    draw_bars(figure.add_subplot(grid[-1, 1]), labels, shares, title="share of the squared delta kept", most=None)
    return encoded(figure)


def _draw_energy(axes: "Axes", energy: Energy) -> None:
    layers = tuple(dict.fromkeys(layer for layer, _ in energy.cells))
    levels = [[energy.level(layer, module) for module in energy.modules] for layer in layers]
    ends = [formatting.percent(end) for end in energy.bounds or ()]
    title = f"{energy.measure}\n(blank: no such tensor, or not changed)"
    draw_map(axes, levels, list(map(str, layers)), energy.modules, ends, title=title)


def _draw_density(axes: "Axes", density: DensityMap, title: str, *, only_kept: bool = False) -> None:
    from matplotlib.colors import LogNorm

    window, counts = fapm_view.window_of(density), density.kept if only_kept else density.entries
    filled = density.entries[density.entries > 0]
    ends = (filled.min(), max(filled.max(), 2 * filled.min())) if filled.size else (1.0, 2.0)
    place: dict[str, Any] = {
        "origin": "lower",
        "aspect": "auto",
        "extent": (window.left, window.right, window.bottom, window.top),
    }
    if only_kept:
        outline = _blank((density.entries[window.cells] > 0).astype(float))
        axes.imshow(outline, cmap="Greys", vmin=0, vmax=6, interpolation="nearest", **place)
    shown = _blank(counts[window.cells])
    image = axes.imshow(shown, cmap="viridis", norm=LogNorm(*ends), interpolation="nearest", **place)
    for curve in fapm_view.curves_of(density, window):
        style = "--" if curve.second else "-"
        axes.plot(*zip(*curve.points, strict=True), style, color=CUT, linewidth=2, label=curve.tooltip_text)
    if axes.lines:
        axes.legend(loc="lower left", fontsize=8)
    for axis, first, last in ((axes.xaxis, window.left, window.right), (axes.yaxis, window.bottom, window.top)):
        ticks = fapm_view.ticks(first, last)
        axis.set_ticks(ticks, [fapm_view.power(octave) for octave in ticks])
    axes.set(title=f"{title}: about {formatting.count(round(counts.sum()))}", xlabel=fapm_view.X_LABEL)
    axes.set_ylabel(fapm_view.y_label(density.metric))
    axes.figure.colorbar(image, ax=axes, label="entries per cell", aspect=40)


def _blank(counts: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return empty cells as NaN, which has no colour."""
    shown = counts.copy()
    shown[shown == 0] = math.nan
    return shown
