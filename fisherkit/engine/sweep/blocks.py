"""Decoder blocks run alone, group by group, with the arguments that the model gave them.

What blocks hand each other beside the hidden states (a mutable mapping among the arguments, such as Gemma's shared
keys and values) travels as part of the boundary between two groups of blocks.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisherkit.engine.model.findings import Unreplayable
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.engine.sweep.recorder import ExtraPlace, HiddenPlace, MappingPlace, Record, TensorPlace

SideKey = tuple[int, str | int]


@dataclass
class Boundary:
    """State that crosses from one group of blocks to the next, or the gradients with respect to it.

    Attributes:
        hidden: hidden states [B, T, ...] in the model's dtype.
        side: tensors that earlier blocks wrote into shared mappings, by (number of the mapping, key).
        inputs: gradients only: of recorded arguments that depend on parameters outside the blocks, by their number.
    """

    hidden: Tensor
    side: dict[SideKey, tuple[Tensor, ...]] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def pack(self) -> tuple[list[Tensor], list[list[Any]]]:
        """Return the tensors in a row, and JSON that tells them apart."""
        places: list[list[Any]] = [["side", *key, len(value)] for key, value in self.side.items()]
        places += [["input", number, 0, 1] for number in self.inputs]
        tensors = [self.hidden, *(t for value in self.side.values() for t in value), *self.inputs.values()]
        return tensors, places

    @classmethod
    def unpack(cls, tensors: Sequence[Tensor], places: Sequence[Sequence[Any]]) -> "Boundary":
        """Rebuild what pack() made."""
        row = iter(tensors)
        boundary = cls(next(row))
        for kind, number, key, count in places:
            value = tuple(next(row) for _ in range(count))
            if kind == "side":
                boundary.side[number, key] = value
            else:
                boundary.inputs[number] = value[0]
        return boundary


def run_blocks(skeleton: Skeleton, blocks: Sequence[int], record: Record, entering: Boundary) -> Boundary:
    """Push a boundary through consecutive blocks with the recorded arguments, under autograd where it is on.

    The side states that are returned are all that were written so far, not only by these blocks.
    """
    shared = _open_mappings(record, entering)
    hidden = entering.hidden
    for number in blocks:
        call = record.calls[number]
        if call is None:
            continue
        args, kwargs = call
        out = skeleton.blocks[number](
            *(_unpack(item, record, shared, hidden) for item in args),
            **{key: _unpack(item, record, shared, hidden) for key, item in kwargs.items()},
        )
        if isinstance(out, tuple | list):
            _check_extras(out[1:], record.takes_extra(number + 1))
            out = out[0]
        hidden = out
    return Boundary(hidden, _written(record, shared))


def differentiate_blocks(
    skeleton: Skeleton,
    blocks: Sequence[int],
    record: Record,
    entering: Boundary,
    gradient_at: Callable[[Boundary], Boundary],
) -> Boundary:
    """Replay blocks from the boundary that enters them, and pass the gradient at their exit down to it.

    Args:
        skeleton: the model; these blocks hold their weights.
        blocks: consecutive block numbers.
        record: what they are called with; not used again by the caller.
        entering: the boundary that enters them; not used again by the caller.
        gradient_at: gives the gradient with respect to the boundary at their exit, which it is called with.
    """
    hidden = _leaf(entering.hidden)
    side = {key: tuple(map(_leaf, value)) for key, value in entering.side.items()}
    inputs = {place: _leaf(record.tensors[place]) for place in record.needs(blocks) & record.live}
    with torch.enable_grad():
        # A block may change its input in place (Gemma scales it), which autograd forbids on a leaf: it gets a copy.
        leaving = run_blocks(skeleton, blocks, record, Boundary(hidden.clone(), side))
    gradient = gradient_at(leaving)
    roots, grads = [leaving.hidden], [gradient.hidden]
    for key, value in gradient.side.items():
        roots += leaving.side[key]
        grads += value
    torch.autograd.backward(roots, grads)
    assert hidden.grad is not None
    passed = Boundary(hidden.grad, inputs=dict(gradient.inputs))
    for key, leaves in side.items():
        if any(leaf.grad is not None for leaf in leaves):
            passed.side[key] = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    for place, leaf in inputs.items():
        if leaf.grad is not None:  # the same argument may reach blocks of several groups: gradients add up
            passed.inputs[place] = passed.inputs[place] + leaf.grad if place in passed.inputs else leaf.grad
    return passed


def _check_extras(extras: Sequence[Any], taken: set[int]) -> None:
    """Refuse outputs beside the hidden states that the next block is called with, unless they are None."""
    for number in taken:
        if number < len(extras) and extras[number] is not None:
            raise Unreplayable(f"its blocks hand each other a {type(extras[number]).__name__} beside the hidden states")


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _open_mappings(record: Record, entering: Boundary) -> list[MutableMapping[Any, Any]]:
    shared: list[MutableMapping[Any, Any]] = []
    for kind, content in record.mappings:
        plain = {key: _unpack(item, record, shared, entering.hidden) for key, item in content.items()}
        shared.append(kind(plain) if plain else kind())
    for (number, key), tensors in entering.side.items():
        shared[number][key] = tensors
    return shared


def _written(record: Record, shared: list[MutableMapping[Any, Any]]) -> dict[SideKey, tuple[Tensor, ...]]:
    side: dict[SideKey, tuple[Tensor, ...]] = {}
    for number, mapping in enumerate(shared):
        given = record.mappings[number][1]
        for key, value in mapping.items():
            if key in given:
                continue
            if not (isinstance(key, str | int) and isinstance(value, tuple) and all(map(torch.is_tensor, value))):
                raise Unreplayable(f"its blocks hand each other a {type(value).__name__} under {key!r}")
            side[number, key] = value
    return side


def _unpack(value: Any, record: Record, shared: list[MutableMapping[Any, Any]], hidden: Tensor) -> Any:
    if isinstance(value, HiddenPlace):
        return hidden
    if isinstance(value, TensorPlace):
        return record.tensors[value.number]
    if isinstance(value, MappingPlace):
        return shared[value.number]
    if isinstance(value, ExtraPlace):
        return None  # all that _check_extras lets through
    if type(value) in (tuple, list):
        return type(value)(_unpack(item, record, shared, hidden) for item in value)
    return value
