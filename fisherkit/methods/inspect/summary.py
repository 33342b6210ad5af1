"""Summary of a Fisher, a mask or a checkpoint: rows per layer, module or tensor, a heat map, and where the mass lies.

``artefacts.statistics`` reads, ``rows`` and ``heat_map`` add up, ``compare`` sets two files against each other, and
``render`` shows the result. No torch is imported where a file has its statistics beside it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fisherkit.artefacts.statistics import Entry, Kind, Source, read_source
from fisherkit.checkpoint.hub import find_file
from fisherkit.errors import OptionError
from fisherkit.kernels.histogram import Histogram
from fisherkit.methods.inspect.compare import Comparison, compare
from fisherkit.methods.inspect.heat_map import HeatMap, heat_map
from fisherkit.methods.inspect.records import Value, finite
from fisherkit.methods.inspect.rows import NAMES, SummaryRow, model_order, row, rows_by
from fisherkit.options.checks import one_of
from fisherkit.options.inspect import By
from fisherkit.progress import Track

MASS_POINTS = (0.01, 0.1, 0.3)
_MEASURES: Mapping[Kind, str] = {"mask": "density", "subspace": "energy"}
_MODES = ("tensors", "weights", "rank", "energy", "effective_rank")
_FIGURES = ("tensors", "weights", "sum", "mean", "share", "max", "zeros", "nonfinite")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that ``inspect`` shows.

    Attributes:
        kind: ``fisher``, ``mask``, ``subspace``, ``checkpoint`` or ``importance`` (a ``layer_importance.json``).
        path: the file or folder.
        by: what a row is.
        columns: names of the columns that apply, the row's name first.
        rows: in model order: blocks by number, modules as papers list them, then what lies outside of the blocks.
        layers: the rows by layer, whatever ``by`` is.
        total: all tensors in one row.
        heat: mean per layer and module.
        histogram: of all entries; empty where it is not known.
        dead: tensors that are zero throughout.
        broken: tensors with infinities or NaN.
        provenance: how the file was made, as extract wrote it.
        comparison: how far another file agrees.
        other: summary of that file.
        entries: the tensors themselves, in model order.
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
    other: "Summary | None"
    entries: tuple[Entry, ...]
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

    def folded(self, most: int) -> "Summary":
        """Return the same summary with neighbouring layers taken together, so that about ``most`` rows are left.

        Only rows by layer fold, and only where there are more than twice as many layers.

        Args:
            most: groups of layers at most.
        """
        layers = sorted({entry.layer for entry in self.entries if entry.layer is not None})
        if self.by != "layer" or len(layers) <= 2 * most:
            return self
        size = math.ceil(len(layers) / most)
        pieces = [layers[start : start + size] for start in range(0, len(layers), size)]
        groups = {layer: (piece[0], piece[-1]) for piece in pieces for layer in piece}

        def name(entry: Entry) -> str:
            if entry.layer is None:
                return entry.layer_name
            first, last = groups[entry.layer]
            return f"{entry.layer_name.removesuffix(str(entry.layer))}{first}-{last}"

        rows = rows_by(self.entries, name, self.total.sum, self.comparison)
        return replace(self, rows=rows, heat=heat_map(self.entries, self.heat.measure, groups))

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
    if other is None:
        return _summarise(source, by, None)
    against = find_file(other)
    comparison = compare(source, against, track)
    return _summarise(source, by, comparison, _summarise(read_source(against, track), by, None))


def _summarise(source: Source, by: By, comparison: Comparison | None, other: Summary | None = None) -> Summary:
    entries = model_order(source.entries)
    total = math.fsum(entry.sum for entry in entries)
    return Summary(
        kind=source.kind,
        path=source.path,
        by=by,
        columns=_columns(source, by, comparison),
        rows=rows_by(entries, NAMES[by], total, comparison),
        layers=rows_by(entries, NAMES["layer"], total, comparison),
        total=row("total", entries, total, comparison),
        heat=heat_map(entries, _MEASURES.get(source.kind, "mean")),
        histogram=source.histogram,
        dead=tuple(entry.name for entry in entries if 0 < entry.weights == entry.zeros),
        broken=tuple(entry.name for entry in entries if entry.nonfinite),
        provenance=source.provenance,
        comparison=comparison,
        other=other,
        entries=tuple(entries),
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


def _natural(value: Value) -> Any:
    """A key that puts layer 10 after layer 9."""
    if not isinstance(value, str):
        return value
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", value)]
