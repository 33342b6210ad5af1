"""Layer importance: how much Fisher lies in each layer, and how gently a layer is therefore treated.

A ``layer_importance.json`` is what extract writes, ``{"layers": [{"layer": 0, "mean": x, ...}, ...]}``, or one of the
plain forms ``{"0": x, ...}`` and ``[x, ...]``. Standard library only.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fisherkit.checkpoint.schema import MisfitError, listed, maybe, number, parse_file, table, text, whole
from fisherkit.errors import CheckpointError, OptionError

POWER = 0.5
FLOOR = 0.1
_FIGURE = maybe(number(0))
ROWS = listed(
    table(
        {"layer": whole(0, 1_000_000)},
        {"name": text(), "weights": whole(), "sum": _FIGURE, "mean": _FIGURE, "share": _FIGURE},
    ),
    1,
)
"""What ``layers`` holds; see checkpoint.schema."""


class LayerRow(NamedTuple):
    """One layer: its number and name, its weights (0 where nothing says so), sum and mean (None likewise)."""

    layer: int
    name: str
    weights: int
    sum: float | None
    mean: float | None


def parse_rows(content: Any, where: str) -> list[LayerRow]:
    """Return the layers of a ``layer_importance.json`` in any of its forms; a plain number is both sum and mean.

    Args:
        content: the JSON value, or the same from Python; layers as ints or digits.
        where: names it in the error.

    Raises:
        CheckpointError: it is none of the forms, or a number is negative or not finite.
    """
    rows = content.get("layers", content) if isinstance(content, Mapping) else content
    try:
        if isinstance(rows, Mapping):
            return [_plain(int(layer), value) for layer, value in rows.items()] or _refuse()
        if isinstance(rows, Sequence) and not isinstance(rows, str) and rows and isinstance(rows[0], Mapping):
            plain = [dict(row) for row in rows]
            ROWS(plain, "layers")
            return [_row(row) for row in plain]
        if isinstance(rows, Sequence) and not isinstance(rows, str):
            return [_plain(layer, value) for layer, value in enumerate(rows)] or _refuse()
        _refuse()
    except (TypeError, ValueError, OverflowError) as error:
        detail = f" ({error})" if isinstance(error, MisfitError) else ""
        raise CheckpointError(
            f'{where}: not a layer importance{detail}: expected {{"layers": [...]}}, {{"0": x}} or [x, ...]'
        ) from None
    raise AssertionError


def read_importance(source: Any) -> dict[int, float]:
    """Return the importance by layer: the mean Fisher of its weights; in a plain form, whatever number is there.

    Args:
        source: path of a ``layer_importance.json``, or what is in one.

    Raises:
        CheckpointError: it cannot be read, or is none of the three forms, or a number is negative or not finite.
    """
    is_path = isinstance(source, str | Path)
    where = str(source) if is_path else "layer importance"
    content = parse_file(Path(source), "the layer importance") if is_path else source
    rows = parse_rows(content, where)
    lacking = next((row.layer for row in rows if row.mean is None), None)
    if lacking is not None:
        raise CheckpointError(f"{where}: not a layer importance: layer {lacking} has no mean; measure it anew")
    return {row.layer: row.mean for row in rows if row.mean is not None}


def layer_scales(importance: Mapping[int, float], *, power: float = POWER, floor: float = FLOOR) -> dict[int, float]:
    """By layer ``(median(I) / I) ** power``, not above 1 and not below ``floor``: what matters most changes least.

    Args:
        importance: I by layer; not negative.
        power: 0 treats all layers alike.
        floor: the smallest scale.

    Raises:
        OptionError: a negative power, or a floor outside of 0 to 1.
    """
    if not 0 <= power < math.inf:
        raise OptionError(f"the power of a layer's scale must be 0 or more, not {power}")
    if not 0 <= floor <= 1:
        raise OptionError(f"the floor of a layer's scale must be between 0 and 1, not {floor}")
    middle = statistics.median(importance.values())
    # A layer at or below the median is left alone; so no division by an importance of zero.
    return {n: 1.0 if value <= middle else max(floor, (middle / value) ** power) for n, value in importance.items()}


def _row(row: Mapping[str, Any]) -> LayerRow:
    figures = (float(value) if (value := row.get(key)) is not None else None for key in ("sum", "mean"))
    return LayerRow(row["layer"], row.get("name", str(row["layer"])), row.get("weights", 0), *figures)


def _plain(layer: int, value: Any) -> LayerRow:
    if not 0 <= float(value) < math.inf:
        raise MisfitError(f"layer {layer} has the importance {value}")
    return LayerRow(layer, str(layer), 0, float(value), float(value))


def _refuse() -> Any:
    raise ValueError("neither")
