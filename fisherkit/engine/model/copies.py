"""Copies between the host and a device, beside the computing where the device has streams (CUDA, XPU).

On every other device a copy is waited for, which is always right. What is on its way must not be touched: a
``HostCopy`` before ``wait``, weights that were sent before ``receive``. Memory that a device reads or writes by itself
is pinned; torch keeps a pinned piece until the copies that it knows of are through, also where it was dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

STAGING_BYTES = 64 << 20
"""Of each of the two pinned pieces through which weights go."""
_ALIGN = 256  # bytes; what a device's allocator gives, so that views of one piece are as good as tensors of their own


def stream_module(device: torch.device) -> Any:
    """Return torch's module of streams and events for a device; None where copies are waited for."""
    return torch.get_device_module(device) if device.type in ("cuda", "xpu") else None


def host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty CPU tensor that ``device`` can read and write by itself: pinned where it has streams."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type in ("cuda", "xpu"))


def host_bytes(tensor: Tensor, device: torch.device) -> int:
    """Return the memory that ``host_memory`` of a tensor's size takes: torch rounds what is pinned to powers of two."""
    pinned = stream_module(device) is not None
    return 1 << (tensor.nbytes - 1).bit_length() if pinned and tensor.nbytes else tensor.nbytes


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on the device, behind what the device was given before; pinned, it is not waited for.

    The tensor must not be changed afterwards.
    """
    return tensor.to(device, non_blocking=stream_module(device) is not None)


def send_small(values: Any, device: torch.device) -> Tensor:
    """Return numbers as a tensor on the device, without waiting for it.

    Args:
        values: what torch.tensor takes: token ids, lengths.
        device: where they go.
    """
    made = torch.tensor(values)
    if stream_module(device) is None:
        return made.to(device)
    return to_device(host_memory(made.shape, made.dtype, device).copy_(made), device)


@dataclass(frozen=True)
class HostCopy:
    """Tensors on their way to the host; ``wait`` for them before anything reads them."""

    tensors: list[Tensor]
    device: torch.device
    arrived: Any = None

    def wait(self) -> list[Tensor]:
        """Return the tensors once they are there; any thread may ask."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def to_host(tensors: Sequence[Tensor]) -> HostCopy:
    """Begin to copy tensors of one device to the host, contiguous; those of the CPU are taken as they are."""
    device = tensors[0].device
    streams = stream_module(device)
    if streams is None:
        return HostCopy([tensor.detach().to("cpu").contiguous() for tensor in tensors], device)
    copies = [host_memory(tensor.shape, tensor.dtype, device) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor.detach(), non_blocking=True)
    arrived = streams.Event()
    arrived.record(streams.current_stream(device))
    return HostCopy(copies, device, arrived)


@dataclass(frozen=True)
class Sent:
    """Tensors on their way to the device, in a few pieces of memory; ``receive`` them before anything reads them."""

    tensors: dict[str, Tensor]
    memory: tuple[Tensor, ...] = ()
    arrived: Any = None

    def receive(self) -> dict[str, Tensor]:
        """Let what the device computes from now on wait for them; the host does not."""
        if self.memory:
            device = self.memory[0].device
            computing = stream_module(device).current_stream(device)
            computing.wait_event(self.arrived)
            for piece in self.memory:
                # Made on another stream: freed, it may be given away there while this one still reads it.
                piece.record_stream(computing)
        return self.tensors


class Sender:
    """Sends groups of tensors to a device on a stream of its own, through two pinned pieces in turn.

    Made for one thread at a time, any thread. Where the device has no streams nothing is sent ahead: tensors stay on
    the host, and whoever loads them copies them.

    Args:
        device: where they go.
        staging_bytes: of each pinned piece.
    """

    def __init__(self, device: torch.device, *, staging_bytes: int = STAGING_BYTES) -> None:
        self._device, self._streams = device, stream_module(device)
        self._size = staging_bytes
        self._stream = self._streams.Stream(device=device) if self._streams is not None else None
        self._pieces: list[tuple[Tensor, Any]] = []

    def send(self, tensors: Mapping[str, Tensor]) -> Sent:
        """Begin to send CPU tensors; they may be dropped once this returns.

        Those that share a piece of memory on the host share one on the device: they come and go together there, too.
        """
        if self._streams is None:
            return Sent(dict(tensors))
        self._pieces = self._pieces or [
            (host_memory((self._size,), torch.uint8, self._device), self._streams.Event()) for _ in range(2)
        ]
        pieces: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            pieces.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
        sent: dict[str, Tensor] = {}
        with self._streams.stream(self._stream):
            memory = [self._send_piece(together, sent) for together in pieces.values()]
            arrived = self._streams.Event()
            arrived.record(self._stream)
        return Sent(sent, tuple(memory), arrived)

    def _send_piece(self, tensors: Mapping[str, Tensor], sent: dict[str, Tensor]) -> Tensor:
        starts = [0, *accumulate(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors.values())]
        memory = torch.empty(starts[-1], dtype=torch.uint8, device=self._device)
        for (name, tensor), start in zip(tensors.items(), starts, strict=False):
            piece = memory[start : start + tensor.nbytes]
            self._copy(piece, tensor.contiguous().reshape(-1).view(torch.uint8))
            sent[name] = piece.view(tensor.dtype).view(tensor.shape)
        return memory

    def _copy(self, target: Tensor, source: Tensor) -> None:
        for start in range(0, len(source), self._size):
            part = source[start : start + self._size]
            staging, left = self._pieces[0]
            self._pieces.reverse()
            left.synchronize()  # what this piece held before has left it
            staging[: len(part)].copy_(part)
            target[start : start + len(part)].copy_(staging[: len(part)], non_blocking=True)
            left.record(self._stream)
