"""Densities inside of a mask's tensors as SVG: per module a small image of layers x heads, or x bands of rows."""

from collections.abc import Sequence

import numpy as np

from fisherkit.methods.inspect.mask_bands import Axis, Bands
from fisherkit.render import formatting, svg
from fisherkit.render.svg import Drawing
from fisherkit.render.svg_pixels import shaded

AXES: dict[Axis, str] = {"heads": "heads", "rows": "bands of output rows", "columns": "bands of input columns"}
_WIDTH = 200.0  # pixels of an image
_ABREAST = 4
_LEFT, _TOP, _GAP, _BELOW = 34.0, 34.0, 44.0, 34.0


def all_layers(bands: Sequence[Bands]) -> list[int]:
    """Return the numbers of all blocks that any module has, ascending."""
    return sorted({layer for module in bands for layer in module.densities})


def highest(bands: Sequence[Bands]) -> float:
    """Return the density that has the scale's upper end: the largest of all bands."""
    return max((share for one in bands for row in one.densities.values() for share in row), default=0.0) or 1.0


def levels(one: Bands, layers: Sequence[int], top: float) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Return densities over the scale's end as [layers, bands]; NaN where a layer has no such tensor or fewer bands."""
    widest = max(map(len, one.densities.values()), default=0)
    shown = np.full((len(layers), widest), np.nan)
    for at, layer in enumerate(layers):
        row = one.densities.get(layer, ())
        shown[at, : len(row)] = row
    return shown / top


def bands(modules: Sequence[Bands]) -> Drawing:
    """Draw an image per module, four abreast, with one scale below all."""
    layers, top = all_layers(modules), highest(modules)
    row = max(4.0, min(15.0, 360 / max(len(layers), 1)))
    tall = row * len(layers)
    body = ""
    for at, one in enumerate(modules):
        x = _LEFT + (at % _ABREAST) * (_WIDTH + _GAP)
        y = _TOP + (at // _ABREAST) * (_TOP + tall + _BELOW)
        body += svg.tag("g", _image(one, layers, top, row), transform=f"translate({x:g} {y:g})")
    lines = -(-len(modules) // _ABREAST)
    bottom = lines * (_TOP + tall + _BELOW) + 12
    measure = "density: share of a band's weights that may change"
    body += svg.scale(_LEFT, bottom, "0 %", formatting.percent(top), measure)
    width = _LEFT + min(len(modules), _ABREAST) * (_WIDTH + _GAP)
    return Drawing(body, max(width, 620.0), bottom + 24)


def _image(one: Bands, layers: Sequence[int], top: float, row: float) -> str:
    """Draw one module's image with its name above, first and last layer at the left, and its axis below."""
    shown = levels(one, layers, top)
    count, tall = shown.shape[1], row * len(layers)
    cell = _WIDTH / max(count, 1)
    body = svg.tag("g", shaded(shown), css="cells", transform=f"scale({cell:g} {row:g})")
    for at, layer in enumerate(layers):
        title = svg.tooltip(_tooltip(one, layer))
        body += svg.tag("rect", title, x=0, y=f"{at * row:.1f}", width=_WIDTH, height=f"{row:.1f}", fill="transparent")
    body += svg.text(0, -8, one.module, css="head")
    for at in {0, len(layers) - 1}:
        body += svg.text(-6, at * row + row / 2 + 4, str(layers[at]), css="dim", **{"text-anchor": "end"})
    return body + svg.text(0, tall + 14, f"{count} {AXES[one.axis]}, first to last", css="dim")


def _tooltip(one: Bands, layer: int) -> str:
    row = one.densities.get(layer)
    if not row:
        return f"layer {layer}, {one.module}: no such tensor"
    least, most = min(row), max(row)
    kind = "head" if one.axis == "heads" else "band"
    return (
        f"layer {layer}, {one.module}: {formatting.percent(least)} in {kind} {row.index(least)}, "
        f"{formatting.percent(most)} in {kind} {row.index(most)}"
    )
