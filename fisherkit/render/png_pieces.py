"""Pieces of PNG figures: a map, bars, percent axes. matplotlib is imported on first use."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherkit.render import formatting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BAR, CUT = "#31688e", "#d81b60"

Levels = Sequence[Sequence[float | None]]
"""Levels from 0 to 1, [layers, modules]; None for a cell that stays blank."""


def new_figure(width: float, height: float, headline: str, sentences: Sequence[str] = ()) -> "Figure":
    """Make a figure of so many inches with a headline and sentences above everything."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle("\n".join([headline, *sentences]), fontsize=10)
    return figure


def draw_map(
    axes: "Axes",
    levels: Levels,
    layers: Sequence[str],
    modules: Sequence[str],
    ends: Sequence[str],
    *,
    title: str,
    diverging: bool = False,
) -> None:
    """Draw a map of layers x modules with a bar of its colours.

    Args:
        axes: to draw on.
        levels: see Levels.
        layers: labels, top to bottom.
        modules: full names, left to right.
        ends: what levels 0 and 1 stand for; empty for a map without a scale.
        title: above it.
        diverging: the middle level means that nothing differs.
    """
    from matplotlib.colors import ListedColormap

    if not modules:
        axes.set_axis_off()
        return
    palette = formatting.diverging if diverging else formatting.colour
    colours = ListedColormap([[part / 255 for part in palette(step / 255)] for step in range(256)])
    shown = [[math.nan if level is None else level for level in row] for row in levels]
    image = axes.imshow(shown, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    names = formatting.short_names(modules)
    axes.set_xticks(
        range(len(modules)), [names[module] for module in modules], rotation=60, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_title(title, fontsize=9)
    if ends:
        scale = axes.figure.colorbar(image, ax=axes, ticks=[0, 1], aspect=50)
        scale.ax.set_yticklabels(ends)


def draw_bars(axes: "Axes", labels: Sequence[str], shares: Sequence[float], *, title: str, most: float | None) -> None:
    """Draw a bar per layer with its percentage.

    Args:
        axes: to draw on.
        labels: of the layers, top to bottom.
        shares: from 0 to 1; NaN for no bar.
        title: above them.
        most: the share at the right end; None for the largest of them.
    """
    bars = axes.barh(labels, [share if math.isfinite(share) else 0.0 for share in shares], color=BAR)
    axes.bar_label(bars, [formatting.percent(share) for share in shares], padding=3, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.18, y=0.005)
    if most is not None:
        axes.set_xlim(0, 1.18 * most)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(title, fontsize=9)
    in_percent(axes.xaxis)


def in_percent(axis: "Axis") -> None:
    """Label an axis of shares in percent, as the pages do."""
    axis.set_major_formatter(lambda share, place: f"{100 * share:g} %")


def encoded(figure: "Figure") -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
