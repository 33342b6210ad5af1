"""Views of what fapm kept: by layer and module, in words, and the part of the density that is worth drawing.

Knows neither SVG nor bitmaps. Energy is the sum of squared deltas; octaves are powers of two on the density's axes (see
``kernels.density``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fisherkit.checkpoint.names.order import in_model_order
from fisherkit.kernels.density import BINS, HIGH, LOW, DensityMap, threshold_curve
from fisherkit.methods.merge.fapm_report import FapmReport
from fisherkit.render import formatting

PER_OCTAVE = round(BINS / (HIGH - LOW))
"""Cells of the density per octave."""
_SMALL = 0.01  # of the largest cell's entries
_THIN = (0.01, 0.001)  # shares of all entries that may lie below and above the axes' ends
X_LABEL = "|W|, in units of its tensor's mean |W|"

_RULES = {
    "fapm": "with the highest S = |delta| (1 - mean|W| / |W|): large changes of large weights",
    "relative": "with the lowest |delta| / |W|",
    "magnitude": "with the highest |delta|",
    "random": "that were drawn at random",
}
_UNITS = {
    "fapm": "threshold",
    "magnitude": "threshold",
    "relative": "threshold times mean |W|",
}
_SCOPES = {"tensor": "In every tensor", "layer": "In every layer", "global": "Over all tensors"}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Rows = Sequence[Mapping[str, Any]]


# Energy


@dataclass(frozen=True)
class Group:
    """Tensors taken together: entries, how many of them were kept, sum of d^2, and what of that is left."""

    name: str
    layer: int | None
    tensors: int
    weights: int
    kept: int
    energy: float
    left: float

    @property
    def share(self) -> float:
        """Share of the energy that is left; NaN where fine-tuning changed nothing."""
        return self.left / self.energy if self.energy else math.nan

    def tooltip_text(self) -> str:
        """Say the figures in words."""
        if not self.energy:
            return f"{self.name}: fine-tuning changed nothing"
        entries = f"{self.kept:,} of {self.weights:,} entries"
        return f"{self.name}: {formatting.percent(self.share)} of the squared delta kept, in {entries}"

    def record(self) -> dict[str, str | int | float | None]:
        """Return a row of a table."""
        return {
            "layer": self.name,
            "tensors": self.tensors,
            "weights": self.weights,
            "kept": self.kept,
            "share": self.kept / self.weights if self.weights else None,
            "squared_delta": self.energy,
            "energy_kept": self.share if self.energy else None,
        }


@dataclass(frozen=True)
class Energy:
    """Kept energy by layer, and by layer and module."""

    layers: tuple[Group, ...]
    cells: Mapping[tuple[int, str], Group]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """In the order of ``checkpoint.names.order``."""
        return in_model_order(module for _, module in self.cells)

    @cached_property
    def bounds(self) -> tuple[float, float] | None:
        """Least and greatest share among cells of some size; None where nothing changed.

        The shares of vectors (norms, biases) scatter so widely that they would leave all matrices the same colour.
        """
        changed = [group for group in self.cells.values() if group.energy]
        largest = max((group.weights for group in changed), default=0)
        shares = [group.share for group in changed if group.weights >= _SMALL * largest]
        return (min(shares), max(shares)) if shares else None

    @property
    def measure(self) -> str:
        """Words for what colours stand for."""
        shares = [group.share for group in self.cells.values() if group.energy]
        beyond = self.bounds is not None and (min(shares), max(shares)) != self.bounds
        return "share of the squared delta kept" + ("; small tensors lie beyond too" if beyond else "")

    def level(self, layer: int, module: str) -> float | None:
        """Return where a share lies between the bounds, 0 to 1, those beyond at the ends; None where there is none."""
        group = self.cells.get((layer, module))
        if group is None or self.bounds is None or not group.energy:
            return None
        low, high = self.bounds
        return min(max((group.share - low) / (high - low), 0.0), 1.0) if high > low else 1.0


def energy_of(report: FapmReport) -> Energy:
    """Add tensors up: blocks by number, then what lies outside of them in the report's order."""
    layers: dict[int | str, list[Mapping[str, Any]]] = {}
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in sorted(report.tensors.values(), key=lambda row: (row["layer"] is None, row["layer"] or 0)):
        if row["layer"] is None:
            layers.setdefault(row["module"], []).append(row)
        else:
            layers.setdefault(row["layer"], []).append(row)
            cells.setdefault((row["layer"], row["module"]), []).append(row)
    return Energy(
        tuple(_group(f"layer {key}" if isinstance(key, int) else key, rows) for key, rows in layers.items()),
        {cell: _group(f"layer {cell[0]}, {cell[1]}", rows) for cell, rows in cells.items()},
    )


def _group(name: str, rows: Rows) -> Group:
    return Group(
        name=name,
        layer=rows[0]["layer"],
        tensors=len(rows),
        weights=sum(row["weights"] for row in rows),
        kept=sum(row["kept"] for row in rows),
        energy=math.fsum(row["energy"] for row in rows),
        left=math.fsum(row["energy"] * row["energy_kept"] for row in rows),
    )


# The density


@dataclass(frozen=True)
class Window:
    """Octaves of the density that hold anything, from ``left`` to ``right`` and ``bottom`` to ``top``."""

    left: int
    right: int
    bottom: int
    top: int

    @property
    def cells(self) -> tuple[slice, slice]:
        """Its rows and columns in the map's arrays."""
        return _cells(self.bottom, self.top), _cells(self.left, self.right)

    def clip(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return points as powers of two, those inside of the window."""
        logs = [(math.log2(x), math.log2(y)) for x, y in points]
        return [(x, y) for x, y in logs if self.left <= x <= self.right and self.bottom <= y <= self.top]


def window_of(density: DensityMap) -> Window:
    """Return octaves with all but the thin ends of the density, and the units themselves, the origin of both axes."""
    rows, columns = (density.entries.sum(axis=axis).reshape(-1, PER_OCTAVE).sum(axis=1) for axis in (1, 0))
    (bottom, top), (left, right) = (_span([float(total) for total in sums]) for sums in (rows, columns))
    return Window(left, right, bottom, top)


def beyond(density: DensityMap, window: Window) -> float:
    """Return the share of all entries that lie outside of the window."""
    total = float(density.entries.sum())
    return max(0.0, 1 - float(density.entries[window.cells].sum()) / total) if total else 0.0


def _span(sums: Sequence[float]) -> tuple[int, int]:
    """Return first and last octave; the small entries are many octaves of little, so more of them may be left out."""
    first, last = 0, len(sums)
    below, above = (share * sum(sums) for share in _THIN)
    while first < -int(LOW) - 1 and sum(sums[: first + 1]) <= below:
        first += 1
    while last > -int(LOW) + 1 and sum(sums[last - 1 :]) <= above:
        last -= 1
    return int(LOW) + first, int(LOW) + last


def _cells(first: int, last: int) -> slice:
    return slice(round((first - LOW) * PER_OCTAVE), round((last - LOW) * PER_OCTAVE))


@dataclass(frozen=True)
class Curve:
    """Cut of some tensors: points as powers of two. ``second`` if others have another."""

    points: Sequence[tuple[float, float]]
    tooltip_text: str
    second: bool = False


def curves_of(density: DensityMap, window: Window) -> list[Curve]:
    """Return the cut inside of the window, thresholds above and below zero apart; none for metrics without one."""
    curves: list[Curve] = []
    for tensors, above in ((density.positive, True), (density.negative, False)):
        points = window.clip(threshold_curve(density.metric, positive=above)) if tensors else []
        if points:
            side = f", whose threshold is {'above' if above else 'below'} 0" if density.metric == "fapm" else ""
            whose = f"{tensors:,} tensor{'s' if tensors != 1 else ''}"
            curves.append(Curve(points, f"the cut of {whose}{side}", second=bool(curves)))
    return curves


def y_label(metric: str) -> str:
    """Say what the density's upright axis measures."""
    return f"|delta|, in units of its tensor's {_UNITS.get(metric, 'mean |delta|')}"


def ticks(first: int, last: int) -> list[int]:
    """Return every second octave between two, both included; 0 is always one."""
    return [octave for octave in range(first, last + 1) if octave % 2 == 0]


def power(exponent: int) -> str:
    """Write a power of two: -3 as ``2⁻³``; ``1`` for 0."""
    return f"2{str(exponent).translate(_RAISED)}" if exponent else "1"


# Words


def headline(report: FapmReport) -> str:
    """Say in one line what was pruned."""
    made, share = report.provenance, formatting.percent(report.totals["density"])
    done = "kept" if report.metric in _RULES else "changed"
    return formatting.printable(f"{report.metric} of {made['tuned']['id']} on {made['base']['id']}: {share} {done}")


def sentences(report: FapmReport) -> list[str]:
    """Say what was asked for, and what the figures come to."""
    total, now = report.totals, "the tuned model's" if report.metric in _RULES else "not the base's"
    lines = [
        asked_for(report),
        f"{total['kept']:,} of {total['weights']:,} entries ({formatting.percent(total['density'])}) are {now}, and "
        f"{formatting.percent(total['energy_kept'])} of the squared delta is left. Fine-tuning itself had not changed "
        f"{total['zero_deltas']:,}.",
    ]
    rule, scope = _RULES.get(report.metric), _SCOPES.get(report.provenance["options"]["scope"])
    return [*lines, f"{scope}, those entries were kept {rule}."] if rule else lines


def asked_for(report: FapmReport) -> str:
    """Say which sparsity was asked for, or that it is the default."""
    options = report.provenance["options"]
    given = options.get("sparsity") is not None or options.get("density") is not None
    # 1 - density is not the decimal that a person typed: 1 - 0.1 is 0.9, but 1 - 0.7 is 0.30000000000000004.
    sparsity = f"{1 - report.density:.10g}"
    return f"Sparsity {sparsity}{'' if given else ' (the default)'}, metric {report.metric}."
