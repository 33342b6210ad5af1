"""The files beside a Fisher: ``<stem>.json`` with provenance and statistics, and ``layer_importance.json``."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.names.location import block_prefix, locate
from fisherkit.checkpoint.target import is_folder
from fisherkit.errors import OutputError

FORMAT = "fisherkit.fisher/1"
IMPORTANCE = "layer_importance.json"


def sidecar_path(target: Path) -> Path:
    """``fisher.json`` beside ``fisher.pt``; inside of a folder."""
    return target / "fisher.json" if is_folder(target) else target.with_suffix(".json")


def check_sidecar(target: Path) -> None:
    """Refuse a target whose sidecar would replace a file of another kind; called before hours of work.

    Raises:
        OutputError: there is a file of that name that is no sidecar of this target.
    """
    path = sidecar_path(target)
    if path.exists() and _entry(path, "file") != target.name:
        raise OutputError(f"{path}: exists already, and the statistics of {target.name} go there; choose another name")


def remove(target: Path) -> None:
    """Drop what an earlier Fisher of this name left beside it, before another file takes its place."""
    for path, key in ((sidecar_path(target), "file"), (importance_path(target), "fisher")):
        if _entry(path, key) == target.name:
            path.unlink()


def importance_path(target: Path) -> Path:
    """``layer_importance.json`` beside the Fisher; under the Fisher's own name if another Fisher's lies there."""
    if is_folder(target):
        return target / IMPORTANCE
    common = target.parent / IMPORTANCE
    if not common.exists() or _entry(common, "fisher") == target.name:
        return common
    return target.with_name(f"{target.stem}.{IMPORTANCE}")


def importance(model: str, target: Path, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sum, mean and share of the Fisher of every layer, in model order.

    Args:
        model: id of the model.
        target: the Fisher's own file, whose name is noted so that two Fishers can share a folder.
        figures: per tensor its ``shape`` and ``sum``.
    """
    blocks = block_prefix(figures)
    layers: dict[int, dict[str, Any]] = defaultdict(lambda: {"weights": 0, "sum": 0.0})
    total = math.fsum(figure["sum"] for figure in figures.values())
    for name, figure in figures.items():
        place = locate(name, blocks)
        if place.layer is not None:
            own = layers[place.layer]
            own["name"] = place.layer_name
            own["weights"] += math.prod(figure["shape"])
            own["sum"] += figure["sum"]
    return {
        "model": model,
        "fisher": target.name,
        "total": total,
        "layers": [
            {
                "layer": layer,
                "name": own["name"],
                "weights": own["weights"],
                "sum": own["sum"],
                "mean": own["sum"] / own["weights"],
                "share": own["sum"] / total if total else 0.0,
            }
            for layer, own in sorted(layers.items())
        ],
    }


def placed(figures: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures per tensor with the layer and module that each lies in."""
    blocks = block_prefix(figures)
    places = {name: locate(name, blocks) for name in figures}
    return {
        name: {"shape": figure["shape"], "layer": places[name].layer, "module": places[name].module, **figure}
        for name, figure in figures.items()
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write aside, then rename; a failed write leaves what was there.

    Raises:
        OutputError: the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def _entry(path: Path, key: str) -> object:
    """What a JSON file says under ``key``; None if it is no such file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content.get(key) if isinstance(content, dict) else None
