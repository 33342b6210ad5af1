"""Buffers that no checkpoint holds (rotary frequencies, masks, scales), filled by the model's own initialisation.

Every entry is marked first. What is still marked afterwards was never computed, and a run on it would measure whatever
lay in the memory; such a model is refused.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fisherkit.errors import UnsupportedModelError

_NO_BOOL = 2  # a byte that is neither False nor True


@torch.no_grad()
def compute_buffers(model: Any, held: frozenset[str] | None, matters: Callable[[str], bool]) -> None:
    """Compute, on the CPU, all buffers that the checkpoint does not hold.

    Args:
        model: on the meta device.
        held: names of parameters and buffers that the checkpoint holds; None where it is not known: it is then taken to
            hold all that are marked as persistent.
        matters: tells by its name if a buffer is used in a run.

    Raises:
        UnsupportedModelError: an entry of such a buffer is computed nowhere.
    """
    owners = list(_owners(model, held))
    for module, name, _ in owners:
        module._non_persistent_buffers_set.add(name)  # so that it stays when the weights of its block are dropped
        module._buffers[name] = _mark_(torch.empty_like(module.get_buffer(name), device="cpu"))
    if owners:
        _initialise(model, model._init_weights)
    for module, name, path in owners:
        if matters(path) and _is_marked(module._buffers[name]):
            raise UnsupportedModelError(
                f"{type(model).__name__}: the buffer {path} is neither in the checkpoint nor computed by this version "
                "of transformers; a Fisher would be measured on whatever lies in memory"
            )


def _owners(model: nn.Module, held: frozenset[str] | None) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield module, name and full path of every buffer to compute."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}" if path else name
            on_disk = name not in module._non_persistent_buffers_set and (held is None or full in held)
            if buffer is not None and not on_disk:
                yield module, name, full


def _initialise(module: nn.Module, own: Callable[[nn.Module], None]) -> None:
    """Initialise a module after its children, each by the innermost pre-trained model around it.

    A nested model knows its own modules; the outermost class knows neither their names nor their config. Parameters are
    on the meta device, where initialising them costs and does nothing.
    """
    if isinstance(module, PreTrainedModel):
        own = module._init_weights
    for child in module.children():
        _initialise(child, own)
    with contextlib.suppress(NotImplementedError, RuntimeError, AttributeError):  # what is then missing stays marked
        own(module)


def _mark_(buffer: Tensor) -> Tensor:
    if buffer.dtype == torch.bool:
        buffer.view(torch.uint8).fill_(_NO_BOOL)
    elif buffer.is_floating_point() or buffer.is_complex():
        buffer.fill_(float("nan"))
    else:
        buffer.fill_(torch.iinfo(buffer.dtype).min)
    return buffer


def _is_marked(buffer: Tensor | None) -> bool:
    if buffer is None or buffer.is_meta:
        return False
    if buffer.dtype == torch.bool:
        return bool((buffer.view(torch.uint8) == _NO_BOOL).any())
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().any())
    return bool((buffer == torch.iinfo(buffer.dtype).min).any()) and buffer.dtype != torch.uint8
