"""Rows of a summary: tensors added up by layer, by module, or one by one."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fisherkit.artefacts.statistics import Entry
from fisherkit.checkpoint.names.order import module_rank
from fisherkit.methods.inspect.compare import Agreement, Comparison, Overlap, mean_agreement
from fisherkit.options.inspect import By

Key = TypeVar("Key", bound=Hashable)

NAMES: Mapping[By, Callable[[Entry], str]] = {
    "layer": lambda entry: entry.layer_name,
    "module": lambda entry: entry.module,
    "tensor": lambda entry: entry.name,
}
"""Name of the row that a tensor belongs to."""


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """Some tensors together. Figures are of magnitudes; NaN or None where they cannot be known.

    Attributes:
        name: of the layer (``model.layers.3``), module (``self_attn.q_proj``) or tensor.
        layer: number of the block that its first tensor is in; None outside the text model's blocks.
        last_layer: number of the block that its last tensor is in.
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
    last_layer: int | None = None
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


def model_order(entries: Sequence[Entry]) -> list[Entry]:
    """Sort tensors: blocks by number, modules within as ``module_rank`` has them; then the rest in the file's order."""

    def key(entry: Entry) -> tuple[bool, int, tuple[int, int]]:
        return entry.layer is None, entry.layer or 0, module_rank(entry.module) if entry.layer is not None else (0, 0)

    return sorted(entries, key=key)


def grouped(entries: Sequence[Entry], key: Callable[[Entry], Key]) -> dict[Key, list[Entry]]:
    """Return the tensors by a key, keys and tensors in order of appearance."""
    groups: dict[Key, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def rows_by(
    entries: Sequence[Entry], key: Callable[[Entry], str], total: float, comparison: Comparison | None
) -> tuple[SummaryRow, ...]:
    """Add tensors up to one row per key; see ``row``."""
    return tuple(row(name, group, total, comparison) for name, group in grouped(entries, key).items())


def row(name: str, entries: Sequence[Entry], total: float, comparison: Comparison | None) -> SummaryRow:
    """Add tensors up to one row.

    Args:
        name: of the row.
        entries: the tensors.
        total: sum over the whole file, of which the row has a share.
        comparison: with another file.
    """
    added, weights = math.fsum(entry.sum for entry in entries), sum(entry.weights for entry in entries)
    return SummaryRow(
        name=name,
        layer=entries[0].layer if entries else None,
        last_layer=entries[-1].layer if entries else None,
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
