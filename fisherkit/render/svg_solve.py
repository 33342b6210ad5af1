"""Figure of a merge that solves: its filter over the spectrum of each weight, and what each layer gave up, as SVG.

The filter keeps 1 / (1 + lam theta) of a delta in a direction in which old inputs have theta times the energy of new
ones. Each weight is a row of ten cells: equal parts of its delta's energy, those that are kept most first.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherkit.methods.inspect.records import Record
from fisherkit.render import formatting, svg
from fisherkit.render.svg import Drawing
from fisherkit.render.svg_pixels import shaded

if TYPE_CHECKING:
    from fisherkit.methods.merge.merge import MergeReport

_WIDTH, _ABREAST = 180.0, 4
_LEFT, _TOP, _GAP, _BELOW = 34.0, 34.0, 44.0, 30.0
_BARS = 260.0


def headline(report: "MergeReport") -> str:
    """Return what the figure is of."""
    tuned, base = (report.provenance[side]["id"] for side in ("tuned", "base"))
    return f"{tuned} onto {base}, solved for with the covariances of their inputs"


def sentences(report: "MergeReport") -> list[str]:
    """Return what a person should know of it, a line each."""
    found, weight = report.totals["regmean"], report.provenance["options"]["old_weight"]
    return [
        f"{found['tensors']:,} weights, old inputs counting {weight:g} beside one of the new.",
        f"Of what the fine-tune does to the layers' outputs, {found['new_kept']:.1%} is left on new inputs and "
        f"{found['old_kept']:.1%} on old ones.",
    ]


def records(report: "MergeReport") -> list[Record]:
    """Return rows by layer: what is left of the delta's energy on new and on old inputs."""
    return [
        {"layer": layer, "kept on new inputs": shares["new"], "kept on old inputs": shares["old"]}
        for layer, shares in _by_layer(report).items()
    ]


def gains(report: "MergeReport") -> Drawing:
    """Draw an image per module: layers from top to bottom, parts of the delta's energy from left to right."""
    modules: dict[str, dict[int, list[float]]] = {}
    for row in report.tensors.values():
        if row.get("regmean", {}).get("gains") and row["layer"] is not None:
            modules.setdefault(row["module"], {})[row["layer"]] = row["regmean"]["gains"]
    layers = sorted({layer for found in modules.values() for layer in found})
    height = max(4.0, min(15.0, 360 / max(len(layers), 1)))
    body = ""
    for at, (module, found) in enumerate(modules.items()):
        x = _LEFT + (at % _ABREAST) * (_WIDTH + _GAP)
        y = _TOP + (at // _ABREAST) * (_TOP + height * len(layers) + _BELOW)
        body += svg.tag("g", _image(module, found, layers, height), transform=f"translate({x:g} {y:g})")
    bottom = -(-len(modules) // _ABREAST) * (_TOP + height * len(layers) + _BELOW) + 12
    body += svg.scale(_LEFT, bottom, "0 %", "100 %", "what is kept of the delta; tenths of its energy, most kept first")
    return Drawing(body, max(620.0, _LEFT + min(len(modules), _ABREAST) * (_WIDTH + _GAP)), bottom + 24)


def layers(report: "MergeReport") -> Drawing:
    """Draw what is left in each layer, as a bar for new and a line for old inputs."""
    rows, height, body = _by_layer(report), 16.0, ""
    for at, (layer, shares) in enumerate(rows.items()):
        y = at * height
        title = svg.tooltip(f"layer {layer}: {shares['new']:.1%} kept on new inputs, {shares['old']:.1%} on old ones")
        body += svg.text(_LEFT - 6, y + 12, str(layer), css="dim", **{"text-anchor": "end"})
        width = f"{_BARS * shares['new']:.1f}"
        body += svg.tag("rect", title, css="bar", x=_LEFT, y=f"{y + 3:g}", width=width, height=height - 6)
        old = _LEFT + _BARS * shares["old"]
        body += svg.line(old, y + 1, old, y + height - 1, css="cut")
        body += svg.text(_LEFT + _BARS + 8, y + 12, formatting.percent(shares["new"]), css="dim")
    bottom = len(rows) * height + 16
    body += svg.text(_LEFT, bottom, "bar: kept of the delta's energy on new inputs; mark: on old ones", css="dim")
    return Drawing(body, 480.0, bottom + 8)


def picture(report: "MergeReport") -> str:
    """Return the whole as an ``.svg`` file."""
    return svg.picture(headline(report), [gains(report), layers(report)], sentences(report))


def _by_layer(report: "MergeReport") -> dict[int, dict[str, float]]:
    """Shares of the energies that are left, by layer, in model order."""
    sums: dict[int, dict[str, float]] = {}
    for row in report.tensors.values():
        found: Mapping[str, Any] | None = row.get("regmean")
        if found is None or row["layer"] is None:
            continue
        own = sums.setdefault(row["layer"], dict.fromkeys(("new", "old", "new_left", "old_left"), 0.0))
        for side in ("new", "old"):
            own[side] += found[f"{side}_energy"]
            own[f"{side}_left"] += found[f"{side}_energy"] * found[f"{side}_kept"]
    return {
        layer: {side: own[f"{side}_left"] / own[side] if own[side] else 1.0 for side in ("new", "old")}
        for layer, own in sorted(sums.items())
    }


def _image(module: str, found: Mapping[int, list[float]], layers: list[int], height: float) -> str:
    count = max(map(len, found.values()))
    shown = np.full((len(layers), count), np.nan)
    for at, layer in enumerate(layers):
        shown[at, : len(found.get(layer, []))] = found.get(layer, [])
    body = svg.tag("g", shaded(shown), css="cells", transform=f"scale({_WIDTH / count:g} {height:g})")
    for at, layer in enumerate(layers):
        row = found.get(layer)
        kept = f"{row[0]:.1%} to {row[-1]:.1%} kept" if row else "not solved for"
        title = svg.tooltip(f"layer {layer}, {module}: {kept}")
        size = {"width": f"{_WIDTH:g}", "height": f"{height:.1f}"}
        body += svg.tag("rect", title, x=0, y=f"{at * height:.1f}", fill="transparent", **size)
    for at in {0, len(layers) - 1}:
        body += svg.text(-6, at * height + height / 2 + 4, str(layers[at]), css="dim", **{"text-anchor": "end"})
    return body + svg.text(0, -8, module, css="head")
