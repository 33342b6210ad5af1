"""Summary of a Fisher, a mask or a checkpoint: rows per layer, module or tensor, a heat map, and where the mass lies.

This module adds up; ``artefacts.statistics`` reads, ``methods.inspect.compare`` sets two files against each other, and
showing the result is the business of ``render``. No torch is imported where a file has its statistics beside it.
"""

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fisherkit.artefacts.statistics import Entry, Kind, Source, read_source
from fisherkit.checkpoint.hub import find_file
from fisherkit.errors import OptionError
from fisherkit.kernels.histogram import Histogram
from fisherkit.methods.inspect.compare import Agreement, Comparison, Overlap, compare, mean_agreement
from fisherkit.methods.inspect.records import Value, finite
from fisherkit.options.checks import one_of
from fisherkit.options.inspect import By
from fisherkit.progress import Track

Key = TypeVar("Key", bound=Hashable)

MASS_POINTS = (0.01, 0.1, 0.3)
_NAMES: Mapping[By, Callable[[Entry], str]] = {
    "layer": lambda entry: entry.layer_name,
    "module": lambda entry: entry.module,
    "tensor": lambda entry: entry.name,
}
_MODES = ("tensors", "weights", "rank", "energy", "effective_rank")
_FIGURES = ("tensors", "weights", "sum", "mean", "share", "max", "zeros", "nonfinite")


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """Some tensors together. Figures are of magnitudes; NaN or None where they cannot be known.

    Attributes:
        name: of the layer (``model.layers.3``), module (``self_attn.q_proj``) or tensor.
        layer: number of the block that its first tensor is in; None outside the text model's blocks.
        tensors: how many tensors were added up.
        weights: how many entries they have.
        sum: of their finite entries.
        mean: ``sum / weights``; for a mask, the share of weights that may change, for a subspace that of energy held.
        share: of the file's total sum.
        max: the largest finite entry.
        zeros: entries that are exactly zero.
        nonfinite: infinities and NaN.
        agreement: with the other file, where two are compared.
        rank: protected directions per tensor, on average.
        effective_rank: over how many each matrix spreads, on average.
    """

    name: str
    layer: int | None
    tensors: int
    weights: int
    sum: float
    mean: float
    share: float
    max: float
    zeros: int
    nonfinite: int
    agreement: Agreement | Overlap | None = None
    rank: float = 0.0
    effective_rank: float = 0.0

    @property
    def dead(self) -> bool:
        """Every entry is zero: no gradient reached these weights."""
        return 0 < self.weights == self.zeros


@dataclass(frozen=True)
class HeatMap:
    """Mean per layer and module of the text model's blocks: of magnitudes on a log scale, of shares from 0 to 1.

    Attributes:
        layers: block numbers, ascending.
        modules: in order of first appearance.
        means: by ``(layer, module)``; a pair without a tensor is missing.
        linear: the means are shares.
        measure: what they are: ``mean``, ``density`` or ``energy``.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    means: Mapping[tuple[int, str], float]
    linear: bool = False
    measure: str = "mean"

    @cached_property
    def bounds(self) -> tuple[float, float] | None:
        """Ends of the scale: 0 and 1, or the smallest and largest positive mean; None when there is none."""
        if self.linear:
            return 0.0, 1.0
        positive = [mean for mean in self.means.values() if mean > 0 and math.isfinite(mean)]
        return (min(positive), max(positive)) if positive else None

    def level(self, layer: int, module: str) -> float | None:
        """Return where a mean lies between the bounds, 0 to 1; None where it is missing or not positive."""
        mean = self.means.get((layer, module), math.nan)
        if self.bounds is None or not (mean > 0 and math.isfinite(mean)):
            return None
        if self.linear:
            return mean
        low, high = map(math.log, self.bounds)
        return (math.log(mean) - low) / (high - low) if high > low else 1.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that ``inspect`` shows.

    Attributes:
        kind: ``fisher``, ``mask``, ``subspace``, ``checkpoint`` or ``importance`` (a ``layer_importance.json``).
        path: the file or folder.
        by: what a row is.
        columns: names of the columns that apply, the row's name first.
        rows: in model order: blocks by number, then what lies outside them in the file's order.
        layers: the rows by layer, whatever ``by`` is.
        total: all tensors in one row.
        heat: mean per layer and module.
        histogram: of all entries; empty where it is not known.
        dead: tensors that are zero throughout.
        broken: tensors with infinities or NaN.
        provenance: how the file was made, as extract wrote it.
        comparison: how far another file agrees.
        notes: what a person should know about how the file was read.
    """

    kind: Kind
    path: Path
    by: By
    columns: tuple[str, ...]
    rows: tuple[SummaryRow, ...]
    layers: tuple[SummaryRow, ...]
    total: SummaryRow
    heat: HeatMap
    histogram: Histogram
    dead: tuple[str, ...]
    broken: tuple[str, ...]
    provenance: Mapping[str, Any] | None
    comparison: Comparison | None
    notes: tuple[str, ...]

    def mass(self) -> tuple[tuple[float, float], ...]:
        """``(top, share)``: what share of the sum the largest 1, 10 and 30 % of all weights hold.

        Empty where that is unknown, and for masks, whose flags are all alike.
        """
        known = self.histogram.total > 0 and self.kind not in ("mask", "subspace")
        return tuple((top, self.histogram.mass(top)) for top in MASS_POINTS) if known else ()

    def value(self, row: SummaryRow, column: str) -> Value:
        """Return what a row has in a column; None for what is unknown or not finite."""
        if column == self.by:
            return row.name
        if self.comparison is not None and column in self.comparison.columns:
            return finite(getattr(row.agreement, column, None))
        return finite(getattr(row, "mean" if column in ("density", "energy") else column))

    def records(self) -> list[dict[str, Value]]:
        """Return the rows as plain dictionaries, fit for JSON."""
        return [{column: self.value(row, column) for column in self.columns} for row in self.rows]

    def sorted(self, column: str | None = None, top: int | None = None) -> "Summary":
        """Return the same summary with its rows sorted by a column, largest first, and cut to the first ``top``.

        A leading ``-`` puts the smallest first. Rows without a value come last. Raises OptionError for a column that
        is not there, and for a ``top`` below 1.
        """
        if top is not None and top < 1:
            raise OptionError(f"--top must be at least 1, not {top}")
        rows = self.rows if column is None else self._order(column)
        return replace(self, rows=tuple(rows[:top]))

    def _order(self, column: str) -> Sequence[SummaryRow]:
        name, ascending = column.removeprefix("-"), column.startswith("-")
        if name not in self.columns:
            raise OptionError(f"--sort {column}: no such column; there are {', '.join(self.columns)}")
        known = [row for row in self.rows if self.value(row, name) is not None]
        unknown = [row for row in self.rows if self.value(row, name) is None]
        return [*sorted(known, key=lambda row: _natural(self.value(row, name)), reverse=not ascending), *unknown]


def inspect(
    path: str | Path, other: str | Path | None = None, *, by: By = "layer", track: Track | None = None
) -> Summary:
    """Summarise a Fisher, a mask, a subspace, a plain checkpoint or a ``layer_importance.json``.

    Statistics beside a Fisher are used when they belong to it; otherwise its tensors are read once in constant memory.

    Args:
        path: a file (``.pt``, ``.safetensors``, ``.json``), a folder of shards, or ``org/name[@revision]``.
        other: another file of the same kind, to compare entry by entry; see ``methods.inspect.compare``.
        by: what a row is.
        track: called with (stage, done, total) as tensors are read.

    Raises:
        CheckpointError: a file that cannot be read, or two files without a common tensor.
        OptionError: an unknown ``by``, or a comparison of files that hold no numbers per weight.
    """
    one_of("by", by, By)
    source = read_source(find_file(path), track)
    if source.kind == "importance" and by != "layer":
        raise OptionError(f"{path} holds layers only: --by {by} needs the Fisher itself")
    comparison = None if other is None else compare(source, find_file(other), track)
    return _summarise(source, by, comparison)


def _summarise(source: Source, by: By, comparison: Comparison | None) -> Summary:
    entries = _model_order(source.entries)
    total = math.fsum(entry.sum for entry in entries)
    return Summary(
        kind=source.kind,
        path=source.path,
        by=by,
        columns=_columns(source, by, comparison),
        rows=_rows(entries, _NAMES[by], total, comparison),
        layers=_rows(entries, _NAMES["layer"], total, comparison),
        total=_row("total", entries, total, comparison),
        heat=_heat_map(entries, {"mask": "density", "subspace": "energy"}.get(source.kind, "mean")),
        histogram=source.histogram,
        dead=tuple(entry.name for entry in entries if 0 < entry.weights == entry.zeros),
        broken=tuple(entry.name for entry in entries if entry.nonfinite),
        provenance=source.provenance,
        comparison=comparison,
        notes=source.notes,
    )


def _columns(source: Source, by: By, comparison: Comparison | None) -> tuple[str, ...]:
    if source.kind == "importance":
        known = any(entry.weights for entry in source.entries)
        return (by, "weights", "sum", "mean", "share") if known else (by, "sum", "share")
    if source.kind == "subspace":
        return (by, *_MODES)
    figures = tuple("density" if source.kind == "mask" and name == "mean" else name for name in _FIGURES)
    return (by, *figures, *(comparison.columns if comparison else ()))


def _model_order(entries: Sequence[Entry]) -> list[Entry]:
    """Blocks by number, then the rest; the file's order within (sorting is stable)."""
    return sorted(entries, key=lambda entry: (entry.layer is None, entry.layer or 0))


def _grouped(entries: Sequence[Entry], key: Callable[[Entry], Key]) -> dict[Key, list[Entry]]:
    groups: dict[Key, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def _rows(
    entries: Sequence[Entry], key: Callable[[Entry], str], total: float, comparison: Comparison | None
) -> tuple[SummaryRow, ...]:
    return tuple(_row(name, group, total, comparison) for name, group in _grouped(entries, key).items())


def _row(name: str, entries: Sequence[Entry], total: float, comparison: Comparison | None) -> SummaryRow:
    added, weights = math.fsum(entry.sum for entry in entries), sum(entry.weights for entry in entries)
    return SummaryRow(
        name=name,
        layer=entries[0].layer if entries else None,
        tensors=len(entries),
        weights=weights,
        sum=added,
        mean=added / weights if weights else math.nan,
        share=added / total if total else math.nan,
        max=max((entry.max for entry in entries), default=math.nan),
        zeros=sum(entry.zeros for entry in entries),
        nonfinite=sum(entry.nonfinite for entry in entries),
        agreement=mean_agreement(comparison, [entry.name for entry in entries]) if comparison else None,
        rank=_average([entry.rank for entry in entries]),
        effective_rank=_average([entry.effective_rank for entry in entries]),
    )


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _heat_map(entries: Sequence[Entry], measure: str) -> HeatMap:
    inside = [entry for entry in entries if entry.layer is not None and entry.module]
    cells = _grouped(inside, lambda entry: (entry.layer or 0, entry.module))
    means = {cell: _row("", group, math.nan, None).mean for cell, group in cells.items()}
    layers = tuple(dict.fromkeys(layer for layer, _ in means))
    return HeatMap(layers, tuple(dict.fromkeys(module for _, module in means)), means, measure != "mean", measure)


def _natural(value: Value) -> Any:
    """A key that puts layer 10 after layer 9."""
    if not isinstance(value, str):
        return value
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", value)]
