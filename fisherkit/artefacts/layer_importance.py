"""Layer importance: how much Fisher lies in each layer, and how gently a layer is therefore treated.

A ``layer_importance.json`` is what extract writes, ``{"layers": [{"layer": 0, "mean": x, ...}, ...]}``, or one of the
plain forms ``{"0": x, ...}`` and ``[x, ...]``. Standard library only.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.headers import file_size, read_start
from fisherkit.errors import CheckpointError, OptionError, first_line

POWER = 0.5
FLOOR = 0.1


def read_importance(source: Any) -> dict[int, float]:
    """Importance by layer: the mean Fisher of its weights; in a plain form, whatever number is there.

    Args:
        source: path of a ``layer_importance.json``, or what is in one.

    Raises:
        CheckpointError: it cannot be read, or is none of the three forms, or a number is negative or not finite.
    """
    where = str(source) if isinstance(source, str | Path) else "layer importance"
    content = _load(Path(source)) if isinstance(source, str | Path) else source
    try:
        found = _parse(content)
    except (KeyError, TypeError, ValueError):
        found = {}
    if not found:
        raise CheckpointError(f'{where}: not a layer importance: expected {{"layers": [...]}}, {{"0": x}} or [x, ...]')
    odd = [layer for layer, value in found.items() if not 0 <= value < math.inf]
    if odd:
        raise CheckpointError(f"{where}: layer {odd[0]} has the importance {found[odd[0]]}; measure it anew")
    return found


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


def _parse(content: Any) -> dict[int, float]:
    rows = content.get("layers", content) if isinstance(content, Mapping) else content
    if isinstance(rows, Mapping):
        return {int(layer): float(value) for layer, value in rows.items()}
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise TypeError(rows)
    if all(isinstance(row, Mapping) for row in rows):
        return {int(row["layer"]): float(row["mean"]) for row in rows}
    return {layer: float(value) for layer, value in enumerate(rows)}


def _load(path: Path) -> Any:
    try:
        return json.loads(read_start(path, file_size(path)))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {first_line(error)}") from None
