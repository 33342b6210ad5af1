"""Files beside a Fisher: ``<stem>.json`` with provenance and statistics, and ``layer_importance.json``."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.names.location import block_prefix, locate
from fisherkit.checkpoint.schema import anything, listed, maybe, named, number, shape, table, text, whole
from fisherkit.checkpoint.target import is_folder
from fisherkit.errors import OutputError
from fisherkit.kernels.histogram import Histogram

FORMAT = "fisherkit.fisher/1"
_FIGURE = maybe(number())
FIGURES = table({"shape": shape, "sum": _FIGURE, "max": _FIGURE, "zeros": whole(), "nonfinite": whole()})
HISTOGRAM = listed(listed(number(0), 3))
SCHEMA = table(
    {
        "format": text(FORMAT),
        "tensors": named(FIGURES),
        "histogram": HISTOGRAM,
    },
    {
        "file": text(),
        "file_bytes": whole(),
        "content_sha256": text(),
        **dict.fromkeys(("model", "prompts", "estimator", "run", "combined"), named(anything)),
        "part": table({"number": whole(1), "of": whole(1), "sha256": text(), "samples": whole(1)}),
    },
)
"""The sidecar; see checkpoint.schema. ``content_sha256`` is missing in files of the first builds."""


def sidecar_path(target: Path) -> Path:
    """Return the JSON that describes a tensor file: ``fisher.json`` beside ``fisher.pt``; inside of a folder."""
    return target / "fisher.json" if is_folder(target) else target.with_suffix(".json")


def why_not_of(sidecar: Mapping[str, Any], path: Path) -> str | None:
    """Return why a sidecar does not describe the tensors at ``path``; None where it does, as far as can be seen.

    Size, names and shapes are compared, and the content (see checkpoint.content) where the sidecar notes it.

    Raises:
        CheckpointError: the tensors cannot be read.
    """
    try:
        SCHEMA(sidecar, "")
        Histogram.from_json(sidecar["histogram"])
    except (TypeError, ValueError) as error:
        return str(error)
    size = path.stat().st_size
    if path.suffix not in {".pt", ".pth", ".bin"}:  # a pickle's tensors cannot be listed without torch
        index = open_index(path)
        shapes = {name: list(info.shape) for name, info in index.tensors.items()}
        if shapes != {name: figures["shape"] for name, figures in sidecar["tensors"].items()}:
            return "other tensors"
        size = sum(file.stat().st_size for file in {info.file for info in index.tensors.values()})
    if sidecar.get("file_bytes") != size:
        return f"{sidecar.get('file_bytes')} bytes there, {size} here"
    if "content_sha256" in sidecar and sidecar["content_sha256"] != content_sha256(path):
        return "other values"
    return None


def check_sidecar(target: Path) -> None:
    """Refuse a target whose sidecar would replace a file of another kind; called before hours of work.

    Raises:
        OutputError: there is a file of that name that is no sidecar of this target.
    """
    check_owned(sidecar_path(target), "file", target, "the statistics")


def check_owned(path: Path, key: str, target: Path, content: str) -> None:
    """Refuse to write a JSON beside a target over a file that does not name this target.

    Args:
        path: the JSON.
        key: under which an earlier one names its target.
        target: the file that it lies beside.
        content: what will be written there, for the message.

    Raises:
        OutputError: there is a file, and it names another target or none.
    """
    if os.path.lexists(path) and owner(path, key) != target.name:
        raise OutputError(f"{path}: exists already, and {content} of {target.name} go there; choose another name")


def owner(path: Path, key: str) -> object:
    """Return what a JSON file says under ``key``; None if there is no such file, or it is not one."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get(key) if isinstance(content, dict) else None


def layer_sums(model: str, target: Path, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of ``layer_importance.json``: the Fisher's sum, mean and share by layer, in model order.

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
    """Return the figures per tensor with the layer and module that each lies in."""
    blocks = block_prefix(figures)
    places = {name: locate(name, blocks) for name in figures}
    return {
        name: {"shape": figure["shape"], "layer": places[name].layer, "module": places[name].module, **figure}
        for name, figure in figures.items()
    }
