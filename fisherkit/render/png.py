"""Summaries and prunings as PNG, through matplotlib, which is imported on first use."""

import io
import math
from typing import TYPE_CHECKING, Any

from fisherkit.methods.inspect.summary import Summary
from fisherkit.render import formatting, summary_text

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from fisherkit.kernels.density import DensityMap
    from fisherkit.methods.merge.fapm_report import FapmReport
    from fisherkit.render.fapm_view import Energy

_BAR, _CUT = "#31688e", "#d81b60"


def summary_png(summary: Summary) -> bytes:
    """The heat map, the bars and the mass curve."""
    from matplotlib.figure import Figure

    height = max(4.0, 1.6 + 0.17 * len(summary.layers))
    figure = Figure(figsize=(13, height), layout="constrained")
    heat, bars, curve = figure.subplots(1, 3, width_ratios=(2, 1.5, 1.5))
    figure.suptitle(summary_text.headline(summary))
    if summary.heat.means:
        levels = [
            [summary.heat.level(layer, module) for module in summary.heat.modules] for layer in summary.heat.layers
        ]
        ends = [formatting.number(end) for end in summary.heat.bounds or ()]
        _draw_heat(heat, levels, summary.heat.layers, summary.heat.modules, ends)
        title = summary.heat.measure if summary.heat.linear else "mean per weight, log scale (blank: none or zero)"
        heat.set_title(title)
    else:
        heat.set_axis_off()
    labels = [summary_text.row_label(row, "layer") for row in summary.layers]
    _draw_bars(bars, labels, [row.share for row in summary.layers])
    bars.set_title("share of the total")
    tops = [10 ** (-4 + step / 30) for step in range(121)]
    curve.semilogx(tops, [summary.histogram.mass(top) for top in tops], color=_BAR)
    curve.set(title="share held by the largest weights", xlabel="fraction of all weights", ylim=(0, 1))
    curve.grid(alpha=0.3)
    return _encoded(figure)


def pruning_png(report: "FapmReport") -> bytes:
    """The density of all and of kept entries, the heat map of kept energy and the bars."""
    from matplotlib.figure import Figure

    from fisherkit.render import fapm_view

    energy = fapm_view.energy_of(report)
    heights = [*([5.4] if report.map is not None else []), max(3.0, 1.6 + 0.17 * len(energy.layers))]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    figure.suptitle(fapm_view.headline(report))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    if report.map is not None:
        _draw_density(figure.add_subplot(grid[0, 0]), report.map, "all entries that changed")
        if report.map.kept.any():
            _draw_density(figure.add_subplot(grid[0, 1]), report.map, "those that were kept", only_kept=True)
    _draw_energy(figure.add_subplot(grid[-1, 0]), energy)
    bars = figure.add_subplot(grid[-1, 1])
    labels = [group.name if group.layer is None else str(group.layer) for group in energy.layers]
    _draw_bars(bars, labels, [group.share for group in energy.layers])
    bars.set_title("share of the squared delta kept")
    return _encoded(figure)


def _draw_energy(axes: "Axes", energy: "Energy") -> None:
    if not energy.cells:
        axes.set_axis_off()
        return
    layers = tuple(dict.fromkeys(layer for layer, _ in energy.cells))
    levels = [[energy.level(layer, module) for module in energy.modules] for layer in layers]
    _draw_heat(axes, levels, layers, energy.modules, [formatting.percent(end) for end in energy.bounds or ()])
    axes.set_title(f"{energy.measure}\n(blank: no such tensor, or not changed)", fontsize=9)


def _draw_density(axes: "Axes", density: "DensityMap", title: str, *, only_kept: bool = False) -> None:
    from matplotlib.colors import LogNorm

    from fisherkit.render import fapm_view

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
        axes.plot(*zip(*curve.points, strict=True), style, color=_CUT, linewidth=2, label=curve.tooltip_text)
    if axes.lines:
        axes.legend(loc="lower left", fontsize=8)
    for axis, first, last in ((axes.xaxis, window.left, window.right), (axes.yaxis, window.bottom, window.top)):
        ticks = fapm_view.ticks(first, last)
        axis.set_ticks(ticks, [fapm_view.power(octave) for octave in ticks])
    axes.set(title=f"{title}: about {formatting.count(round(counts.sum()))}", xlabel=fapm_view.X_LABEL)
    axes.set_ylabel(fapm_view.y_label(density.metric))
    axes.figure.colorbar(image, ax=axes, label="entries per cell", aspect=40)


def _blank(counts: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Empty cells as NaN, which has no colour."""
    shown = counts.copy()
    shown[shown == 0] = math.nan
    return shown


# Pieces of both


def _draw_heat(
    axes: "Axes",
    levels: list[list[float | None]],
    layers: tuple[int, ...],
    modules: tuple[str, ...],
    ends: list[str],
) -> None:
    shown = [[math.nan if level is None else level for level in row] for row in levels]
    image = axes.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    names = formatting.short_names(modules)
    axes.set_xticks(
        range(len(modules)), [names[module] for module in modules], rotation=60, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    if ends:
        scale = axes.figure.colorbar(image, ax=axes, ticks=[0, 1], aspect=50)
        scale.ax.set_yticklabels(ends)


def _draw_bars(axes: "Axes", labels: list[str], shares: list[float]) -> None:
    axes.barh(labels, [share if math.isfinite(share) else 0.0 for share in shares], color=_BAR)
    axes.invert_yaxis()
    axes.margins(y=0.005)
    axes.tick_params(axis="y", labelsize=7)


def _encoded(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
