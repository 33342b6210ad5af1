"""Linear layers among the targets, which hooks can serve; and a check that batches of several samples suit them.

Knows modules and their names, nothing of gradients.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fisherkit.engine.model.findings import NeedsBatchSizeOne


@dataclass
class LinearLayer:
    """A linear layer and the parameters of it that are targets, by name; None for one that is not."""

    module: nn.Module
    weight: str | None = None
    bias: str | None = None


def find_linear_layers(
    model: nn.Module, names: Iterable[str], general: frozenset[str]
) -> tuple[list[LinearLayer], list[str]]:
    """Split parameters into linear layers that hooks can serve, and names that are left to autograd.

    Args:
        model: that holds the parameters.
        names: of parameters.
        general: names to leave to autograd although a linear layer holds them.
    """
    layers: dict[int, LinearLayer] = {}
    others = []
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        linear = type(module).forward is nn.Linear.forward or type(module) is Conv1D
        if name in general or not linear or attribute not in ("weight", "bias"):
            others.append(name)
        else:
            setattr(layers.setdefault(id(module), LinearLayer(module)), attribute, name)
    return list(layers.values()), others


class BatchingCheck:
    """Context that watches one forward of some blocks and decides if batches may hold several samples."""

    def __init__(self, model: nn.Module, names: Iterable[str], general: frozenset[str]) -> None:
        self._layers, self._others = find_linear_layers(model, names, general)
        self._shapes: dict[int, list[torch.Size]] = {id(layer.module): [] for layer in self._layers}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for layer in self._layers:
            self._hooks.callback(layer.module.register_forward_pre_hook(self._note, with_kwargs=True).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.close()

    def check(self, ids: Tensor) -> None:
        """Raise NeedsBatchSizeOne unless every linear target was called, on inputs [B, T, ...] like ids [B, T].

        A linear layer that is never called has its weight used in another way, which only autograd sees.
        """
        silent = [layer for layer in self._layers if not self._shapes[id(layer.module)]]
        flat = any(shape[:2] != ids.shape for shapes in self._shapes.values() for shape in shapes)
        if silent or (len(ids) > 1 and (flat or self._others)):
            names = {name for layer in silent for name in (layer.weight, layer.bias) if name is not None}
            raise NeedsBatchSizeOne(frozenset(names))

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        self._shapes[id(module)].append(inputs.shape)
