"""Inputs of fused experts: which tokens each expert reads, seen where their weights are multiplied.

A model holds the matrices of its experts as one parameter [E, ...], and multiplies them either one by one
(``linear(x, weight[e])``) or all at once (``grouped_mm(x, weight, offs)``, tokens sorted by expert). Both are watched;
no architecture is re-implemented. Batches hold one sample, so that there is no padding among the tokens.

Axes: E experts, R tokens, C channels.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherkit.engine.model.plan import Plan
from fisherkit.engine.model.skeleton import Skeleton, TargetTensor

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_GROUPED = ("grouped_mm", "_grouped_mm")


class Experts(NamedTuple):
    """Fused experts whose matrices are tensors of their own in the checkpoint.

    Attributes:
        block: that they lie in.
        channels: of their inputs.
        tensors: checkpoint names of the matrices that read the same tokens, by expert.
    """

    block: int
    channels: int
    tensors: Mapping[int, tuple[str, ...]]


def experts_of(skeleton: Skeleton, plan: Plan, blocks: Sequence[int]) -> dict[str, Experts]:
    """Return the fused experts of some blocks, by their parameter.

    Args:
        skeleton: the model.
        plan: its targets.
        blocks: block numbers.
    """
    found = {}
    for block in blocks:
        for name, tensors in plan.targets.get(block, {}).items():
            apart = _apart(tensors)
            sizes = {tensor.shape[-1] for tensor in tensors}
            if apart and len(sizes) == 1 and sizes <= set(skeleton.model.get_parameter(name).shape[1:]):
                found[name] = Experts(block, sizes.pop(), apart)
    return found


def _apart(tensors: Sequence[TargetTensor]) -> dict[int, tuple[str, ...]]:
    """Return tensors by the expert in their names; empty where one is no single expert's matrix."""
    found: dict[int, tuple[str, ...]] = {}
    for tensor in tensors:
        match = _EXPERT.search(tensor.name)
        if match is None or len(tensor.shape) != 2:
            return {}
        expert = int(match[1])
        found[expert] = (*found.get(expert, ()), tensor.name)
    return found


class ExpertInputs(TorchFunctionMode):
    """Context that hands on the tokens that reach each expert.

    Args:
        parameters: weights of fused experts [E, ...], by name; they lie where they will be multiplied.
        take: called with a parameter's name, an expert and its tokens [R, C].
    """

    def __init__(self, parameters: Mapping[str, Tensor], take: Callable[[str, int, Tensor], None]) -> None:
        super().__init__()
        self._spans = {name: (one.data_ptr(), one.stride(0) * one.element_size()) for name, one in parameters.items()}
        self._counts = {name: one.shape[0] for name, one in parameters.items()}
        self._take = take

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a call of torch on its way."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function is torch.nn.functional.linear and len(args) > 1:
            self._one(args[0], args[1])
        elif name in _GROUPED and len(args) > 1:
            offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
            if offsets is not None:
                self._all(args[0], args[1], offsets)
        return function(*args, **kwargs)

    def _one(self, tokens: Tensor, weight: Tensor) -> None:
        at = self._find(weight)
        if at is not None:
            self._take(*at, tokens.detach().reshape(-1, tokens.shape[-1]))

    def _all(self, tokens: Tensor, weight: Tensor, offsets: Tensor) -> None:
        at = self._find(weight)
        if at is None:
            return
        start = 0
        for expert, stop in enumerate(offsets.tolist()):
            if stop > start:
                self._take(at[0], expert, tokens[start:stop].detach())
            start = stop

    def _find(self, weight: Tensor) -> tuple[str, int] | None:
        """Return whose weight it is, and the expert that it begins with."""
        place = weight.data_ptr()
        for name, (start, stride) in self._spans.items():
            expert, rest = divmod(place - start, stride)
            if rest == 0 and 0 <= expert < self._counts[name]:
                return name, expert
        return None
