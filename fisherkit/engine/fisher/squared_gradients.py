"""Squared per-sample gradients of the targets of some blocks, gathered while a batch is replayed.

*Linear layers* (and GPT-2's Conv1D, the same with the weight transposed) never compute a weight gradient through
autograd: a forward hook keeps the input, a hook on the output hands over its gradient, and the kernel adds the squares
for all samples of the batch. *Any other parameter* goes through autograd, which sums over a batch; so where there is
one, batches hold one sample each.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fisherkit.engine.model.findings import Unreplayable
from fisherkit.engine.model.linear_layers import LinearLayer, find_linear_layers
from fisherkit.kernels.fisher import add_squared_bias_grads_, add_squared_linear_grads_, add_squares_


@dataclass
class _Call:
    inputs: Tensor
    version: int
    grad: Tensor | None = None


@dataclass
class _HookedLayer:
    layer: LinearLayer
    calls: list[_Call] = field(default_factory=list)


@contextmanager
def trainable(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Unfreeze these parameters inside the ``with``; all others stay frozen, so autograd computes nothing for them."""
    parameters = {name: model.get_parameter(name) for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def add_squared_parameters_(sums: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Add the squares of one sample's gradients (``parameter.grad``, which is cleared) to ``sums``, float32."""
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            add_squares_(sums[name], parameter.grad)
            parameter.grad = None


class Capture:
    """Context that adds the squared per-sample gradients of each batch that is replayed inside of it.

    Args:
        model: whose blocks are replayed.
        accumulators: parameter name -> float32 sums shaped like the parameter, changed in place.
        general: parameters to leave to autograd although a linear layer holds them.
    """

    def __init__(self, model: nn.Module, accumulators: Mapping[str, Tensor], general: frozenset[str]) -> None:
        self._accumulators = accumulators
        layers, others = find_linear_layers(model, accumulators, general)
        self._hooked = [_HookedLayer(layer) for layer in layers]
        self._others: dict[str, nn.Parameter] = {}
        self._enter_others = trainable(model, others)
        self._lengths: Sequence[int] = ()
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for hooked in self._hooked:
            handle = hooked.layer.module.register_forward_hook(self._hook(hooked), with_kwargs=True)
            self._hooks.callback(handle.remove)
        self._others = self._hooks.enter_context(self._enter_others)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.close()
        self._others = {}  # or the weights would stay in memory as long as this does
        for hooked in self._hooked:
            hooked.calls.clear()

    def begin(self, lengths: Sequence[int]) -> None:
        """Announce the next batch: its samples have these many tokens and are padded on the right."""
        self._lengths = lengths

    @torch.no_grad()
    def finish(self) -> None:
        """Add what the hooks left over: layers called more than once, and parameters left to autograd."""
        for hooked in self._hooked:
            self._add(hooked, [call for call in hooked.calls if call.grad is not None])
            hooked.calls.clear()
        add_squared_parameters_(self._accumulators, self._others)

    def _hook(self, hooked: _HookedLayer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            inputs = args[0] if args else kwargs["input"]
            call = _Call(inputs.detach(), inputs._version)
            hooked.calls.append(call)
            if not output.requires_grad:
                output.requires_grad_()  # a layer fed by constants alone still has a gradient of its own

            def receive(grad: Tensor) -> None:
                call.grad = grad
                if len(hooked.calls) == 1:  # the common case: add at once, and let go of input and gradient
                    with torch.no_grad():
                        self._add(hooked, [call])
                    call.grad = None
                    call.inputs = call.inputs.new_empty(0)

            output.register_hook(receive)  # type: ignore[no-untyped-call]

        return hook

    def _add(self, hooked: _HookedLayer, calls: list[_Call]) -> None:
        """Add the squares of each sample's gradient, summed over all calls of the layer in this replay first."""
        if not calls:
            return
        if any(call.inputs._version != call.version for call in calls):
            raise Unreplayable("it changes the input of a linear layer in place")
        inputs = _per_sample([call.inputs for call in calls], self._lengths)
        grads = _per_sample([_given(call.grad).to(call.inputs.dtype) for call in calls], self._lengths)
        if hooked.layer.weight is not None:
            rows, columns = (inputs, grads) if isinstance(hooked.layer.module, Conv1D) else (grads, inputs)
            add_squared_linear_grads_(self._accumulators[hooked.layer.weight], columns, rows)
        if hooked.layer.bias is not None:
            add_squared_bias_grads_(self._accumulators[hooked.layer.bias], grads)


def _per_sample(calls: list[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Turn [B, T, ..., C] of each call into one [tokens of all calls, C] per sample, padding left out."""
    if len(lengths) == 1:
        return [torch.cat([_flat(call) for call in calls])]
    samples = [[_flat(call[number, :length]) for call in calls] for number, length in enumerate(lengths)]
    return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in samples]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad
