"""Shares by layer and by weight: as much of a mask or a ``layer_importance.json`` as other tools can take."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherkit.artefacts.layer_importance import layer_scales, read_importance
from fisherkit.artefacts.mask_file import MaskFile, open_mask
from fisherkit.checkpoint.folder.side_files import read_config
from fisherkit.checkpoint.headers import parse_json
from fisherkit.checkpoint.hub import resolve_model
from fisherkit.checkpoint.names.axes import AxisFinder
from fisherkit.checkpoint.names.location import Location, block_prefix, locate
from fisherkit.errors import CheckpointError

_COUNT_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


@dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """One weight of a mask.

    Attributes:
        name: in the checkpoint.
        place: where it sits in the model.
        numel: its entries.
        kept: how many of them may change.
        rank: the largest r of a LoRA that has no more entries than may change; 0 for what is no linear layer.
    """

    name: str
    place: Location
    numel: int
    kept: int
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """Content of a mask or a ``layer_importance.json``.

    Attributes:
        path: the file.
        model: that it was measured on; empty where unknown.
        layers: by number, the share of the layer that may change, or the factor of its updates; ascending.
        layer_count: layers of the model, the file's and others; None where nothing tells.
        prefix: of the layers' names, ``model.layers``.
        weights: of a mask; empty for layer importance.
    """

    path: Path
    model: str
    layers: Mapping[int, float]
    layer_count: int | None
    prefix: str
    weights: tuple[WeightFacts, ...] = ()

    def all_layers(self, tool: str) -> list[float]:
        """Return the share of every layer of the model; 1 for those that the file is silent about: they are free.

        Args:
            tool: that asks, for the message.

        Raises:
            CheckpointError: nothing tells how many layers the model has, or it has fewer than the file speaks of.
        """
        if self.layer_count is None:
            raise CheckpointError(
                f"{self.path}: does not say how many layers its model has, and {tool} needs a setting for each; "
                "name the model with --base"
            )
        last = max(self.layers, default=-1)
        if last >= self.layer_count:
            raise CheckpointError(f"{self.path}: speaks of layer {last}, and the model has {self.layer_count} layers")
        return [self.layers.get(layer, 1.0) for layer in range(self.layer_count)]


def read_facts(path: Path, base: str | None) -> MaskFacts:
    """Read what a file says; a mask is read once, tensor by tensor.

    Args:
        path: a mask, or a ``layer_importance.json``.
        base: the model that the user names; asked for its number of layers where the file does not tell.

    Raises:
        CheckpointError: the file cannot be read, or is a subspace.
    """
    return _from_importance(path, base) if path.suffix == ".json" else _from_mask(path, base)


def _from_importance(path: Path, base: str | None) -> MaskFacts:
    scales = layer_scales(read_importance(path))
    content = json.loads(path.read_bytes())
    described = content if isinstance(content, dict) else {}
    rows = described.get("layers")
    named = str(rows[0].get("name", "")) if isinstance(rows, list) and rows and isinstance(rows[0], dict) else ""
    model = str(described.get("model", ""))
    layer_count = _layers_beside(path, described.get("fisher"))
    return MaskFacts(
        path=path,
        model=model,
        layers=dict(sorted(scales.items())),
        layer_count=layer_count if layer_count is not None else _layers_of(base or model, ask_hub=base is not None),
        prefix=named.rpartition(".")[0] or "layers",
    )


def _from_mask(path: Path, base: str | None) -> MaskFacts:
    with open_mask(path) as file:
        if file.kind != "mask":
            raise CheckpointError(f"{path}: is a subspace, which no other tool takes; give a mask")
        prefix = block_prefix(file.names)
        axes = _axes(file)
        weights = tuple(_weight(file, name, prefix, axes) for name in file.names)
        fisher = file.fisher or {}
    model = str((fisher.get("model") or {}).get("id") or "")
    layer_count = fisher.get("layers")
    return MaskFacts(
        path=path,
        model=model,
        layers=_shares(weights),
        layer_count=layer_count
        if isinstance(layer_count, int)
        else _layers_of(base or model, ask_hub=base is not None),
        prefix=prefix or "layers",
        weights=weights,
    )


def _layers_beside(path: Path, fisher: object) -> int | None:
    """Return how many layers the model of the Fisher beside a ``layer_importance.json`` has; None if unknown."""
    name = Path(str(fisher or "")).name
    beside = path.with_name(name).with_suffix(".json") if name else None
    if beside is None or not beside.is_file():
        return None
    count = parse_json(beside, beside.read_bytes(), "description of the Fisher").get("layers")
    return count if isinstance(count, int) else None


def _layers_of(model: str, *, ask_hub: bool) -> int | None:
    """Return how many layers a model's config.json tells of; None where it does not, or there is none here."""
    if not model or not (ask_hub or Path(model).exists()):
        return None
    config = read_config(resolve_model(model, weights=False).path)
    text: Any = config.get("text_config", config)
    found = (text.get(key) for key in _COUNT_KEYS) if isinstance(text, dict) else ()
    return next((count for count in found if isinstance(count, int)), None)


def _shares(weights: tuple[WeightFacts, ...]) -> dict[int, float]:
    free: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for weight in weights:
        if weight.place.layer is not None:
            free[weight.place.layer][0] += weight.kept
            free[weight.place.layer][1] += weight.numel
    return {layer: kept / total for layer, (kept, total) in sorted(free.items()) if total}


def _axes(file: MaskFile) -> AxisFinder:
    shapes = {name: shape for name in file.names if (shape := file.shape(name)) is not None}
    return AxisFinder(shapes, str(((file.fisher or {}).get("model") or {}).get("architecture") or ""))


def _weight(file: MaskFile, name: str, prefix: str | None, axes: AxisFinder) -> WeightFacts:
    found, kept, place = file.entry(name), file.kept(name), locate(name, prefix)
    if found is None:  # without a description flags stand for entries: shares stay right
        return WeightFacts(name=name, place=place, numel=file.read(name).size, kept=kept)
    rank = 0
    linear = len(found.shape) == 2 and axes.axes(name) == (1, 0) and ".experts." not in name  # fused in memory
    if linear:
        rank = kept // sum(found.shape) if sum(found.shape) else 0
    return WeightFacts(name=name, place=place, numel=found.numel, kept=kept, rank=rank)
