"""Means per layer and module, as maps: of one file, and of the ratio of two."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fisherkit.artefacts.statistics import Entry
from fisherkit.checkpoint.names.order import in_model_order
from fisherkit.methods.inspect.rows import grouped

Cell = tuple[int, str]
"""Number of a block, and a module in it."""

_EQUAL = 1 / 32  # densities that differ by less have the same shade


@dataclass(frozen=True)
class HeatMap:
    """Mean per layer and module of the text model's blocks: of magnitudes on a log scale, of shares from 0 to 1.

    Attributes:
        layers: block numbers, ascending; the first of each group of blocks where these are taken together.
        modules: in the order of ``checkpoint.names.order``.
        means: by ``(layer, module)``; a pair without a tensor is missing.
        linear: the means are shares.
        measure: what they are: ``mean``, ``density`` or ``energy``.
        weights: entries that each mean is taken over.
        last: last block of each group of blocks, by its first; empty where every block stands alone.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    means: Mapping[Cell, float]
    linear: bool = False
    measure: str = "mean"
    weights: Mapping[Cell, int] = field(default_factory=dict)
    last: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> tuple[float, float] | None:
        """Ends of the scale: 0 and 1, or the smallest and largest positive mean; None when there is none."""
        return (0.0, 1.0) if self.linear else positive_bounds([self])

    @property
    def is_flat(self) -> bool:
        """True for shares that are all equal to the eye, as where every tensor of a mask has the same quota."""
        return self.linear and bool(self.means) and max(self.means.values()) - min(self.means.values()) < _EQUAL

    def level(self, layer: int, module: str, bounds: tuple[float, float] | None = None) -> float | None:
        """Return where a mean lies between the bounds, 0 to 1; None where it is missing or not positive.

        Args:
            layer: number of a block.
            module: in it.
            bounds: of a scale that several maps share; None for the map's own.
        """
        mean, bounds = self.means.get((layer, module), math.nan), bounds or self.bounds
        if bounds is None or not (mean > 0 and math.isfinite(mean)):
            return None
        if self.linear:
            return mean
        low, high = map(math.log, bounds)
        return (math.log(mean) - low) / (high - low) if high > low else 1.0

    def label(self, layer: int) -> str:
        """Name a line of the map: the number of its block, or those of its first and last."""
        last = self.last.get(layer, layer)
        return f"{layer}" if last == layer else f"{layer}-{last}"


def positive_bounds(maps: Sequence[HeatMap]) -> tuple[float, float] | None:
    """Return the smallest and the largest positive mean of several maps; None when there is none."""
    positive = [mean for heat in maps for mean in heat.means.values() if mean > 0 and math.isfinite(mean)]
    return (min(positive), max(positive)) if positive else None


def heat_map(entries: Sequence[Entry], measure: str, groups: Mapping[int, tuple[int, int]] | None = None) -> HeatMap:
    """Take the mean of every layer and module.

    Args:
        entries: tensors; those outside of the blocks are left out.
        measure: what the means are, see HeatMap.
        groups: first and last block of the group that a block is in; None for one line per block.
    """
    groups = groups or {}
    inside = [entry for entry in entries if entry.layer is not None and entry.module]

    def cell(entry: Entry) -> Cell:
        layer = entry.layer or 0
        return groups.get(layer, (layer, layer))[0], entry.module

    cells = grouped(inside, cell)
    weights = {one: sum(entry.weights for entry in group) for one, group in cells.items()}
    sums = {one: math.fsum(entry.sum for entry in group) for one, group in cells.items()}
    return HeatMap(
        layers=tuple(dict.fromkeys(layer for layer, _ in cells)),
        modules=in_model_order(module for _, module in cells),
        means={one: sums[one] / weights[one] if weights[one] else math.nan for one in cells},
        linear=measure != "mean",
        measure=measure,
        weights=weights,
        last=dict(groups.values()),
    )


@dataclass(frozen=True)
class Ratios:
    """Two maps of means cell by cell, as powers of two.

    A cell is log2(here / there) after both totals over the common cells were made equal: two Fishers of different loss
    reductions or prompt sets differ by a factor that says nothing about where the information lies.

    Attributes:
        layers: block numbers that either map has, ascending.
        modules: that either map has.
        cells: by ``(layer, module)``; missing where either side is missing or not positive.
        overall: log2 of the ratio of the totals, which was taken out; NaN where nothing is common.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    cells: Mapping[Cell, float]
    overall: float

    @property
    def bound(self) -> float:
        """The largest distance from 0, at least a hundredth, so that equal files have a scale too."""
        return max([0.01, *map(abs, self.cells.values())])

    def level(self, layer: int, module: str) -> float | None:
        """Return where a cell lies between ``-bound`` and ``bound``, 0 to 1; None where it is missing."""
        value = self.cells.get((layer, module))
        return None if value is None else 0.5 + value / (2 * self.bound)


def ratios(here: HeatMap, there: HeatMap) -> Ratios:
    """Hold two maps of means against each other; see Ratios."""
    common = [
        one
        for one, mean in here.means.items()
        if one in there.means and all(0 < value < math.inf for value in (mean, there.means[one]))
    ]
    totals = [math.fsum(heat.means[one] * here.weights[one] for one in common) for heat in (here, there)]
    overall = math.log2(totals[0] / totals[1]) if common else math.nan
    return Ratios(
        layers=tuple(sorted({*here.layers, *there.layers})),
        modules=in_model_order((*here.modules, *there.modules)),
        cells={one: math.log2(here.means[one] / there.means[one]) - overall for one in common},
        overall=overall,
    )
