"""An accelerator that is none: tensors on a device of their own, computed on the CPU, with what a GPU would punish.

A tensor on ``lazy:0`` wraps one on the CPU. Operations unwrap, compute and wrap again, on any thread. Raised is where
a CPU tensor of one axis or more meets one of the device, which a GPU would refuse, and where a dtype appears that the
device lacks. Counted are copies and synchronisations, each by the line of fisherkit that causes it.

Copies that do not block happen late, as they do on a GPU: see pretend_streams.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pretend_streams
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fisherkit.methods.extract.measure  # what these import is patched below, and must be there by then
import fisherkit.methods.score.run  # noqa: F401
from fisherkit.engine.model import copies, device, memory

DEVICE = torch.device("lazy:0")
PACKAGE = str(Path(device.__file__).parents[2])
MEMORY_BYTES = 8 << 30

_READS_VALUES = (
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
)
"""Operations whose answer the host waits for: a GPU finishes all that it was given before it has one."""
_MOVES = ("_to_copy", "copy_")


@dataclass
class Traffic:
    """What went between host and device while ``watching``, by ``file:line`` of fisherkit.

    Attributes:
        syncs: times that the host waited for the device, on the main thread.
        copies: copies to or from the device that the main thread began, waiting or not.
        behind: copies that other threads began.
        launches: operations on the device.
        lacking: dtypes that the device has not.
    """

    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    behind: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    lacking: frozenset[torch.dtype] = frozenset()

    def note_sync(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.syncs[_line()] += 1

    def note_copy(self, *, waits: bool) -> None:
        main = threading.current_thread() is threading.main_thread()
        (self.copies if main else self.behind)[_line()] += 1
        if main and waits:
            self.syncs[_line()] += 1


_watched = [Traffic()]


class PretendTensor(Tensor):
    """Wraps a CPU tensor; all that is known of it outside are its sizes."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "PretendTensor":
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(operation, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def record_stream(self, stream: pretend_streams.Stream) -> None:
        stream.keeps.append(self)


def to_pretend(tensor: Tensor) -> Tensor:
    """The tensor on the device, behind the back of what counts."""
    return PretendTensor(tensor.detach().clone())


def to_host(tensor: Tensor) -> Tensor:
    """The CPU tensor inside."""
    return tensor.raw if isinstance(tensor, PretendTensor) else tensor


def _run(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = operation.overloadpacket.__name__
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in given if isinstance(tensor, PretendTensor)]
    theirs = [tensor for tensor in given if not isinstance(tensor, PretendTensor)]
    wanted = kwargs.get("device")
    stays = wanted is None or torch.device(wanted).type == DEVICE.type
    if name in _MOVES and (theirs or not stays):
        return _move(operation, args, kwargs, stays)
    mixed = [tensor for tensor in theirs if tensor.ndim]
    if ours and mixed:
        raise RuntimeError(f"{operation}: a tensor of the CPU, {list(mixed[0].shape)}, meets one of {DEVICE}")
    if name in _READS_VALUES or (name in ("index", "index_put_") and _by_flags(args[1])):
        _watched[-1].note_sync()
    plain, named = pytree.tree_map(to_host, (tuple(args), dict(kwargs)))
    if ours:
        _watched[-1].launches[_line()] += 1
    if wanted is not None and stays:
        named["device"] = torch.device("cpu")
    if name == "histc" and not plain[0].is_floating_point():  # GPUs count whole numbers, CPUs do not
        return _wrap(operation(plain[0].float(), *plain[1:], **named).to(plain[0].dtype), args)
    return _wrap(operation(*plain, **named), args) if stays else operation(*plain, **named)


def _move(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], stays: bool) -> Any:
    """Copy between host and device."""
    if operation.overloadpacket.__name__ == "_to_copy":
        source = args[0]
        dtype, waits = kwargs.get("dtype") or source.dtype, not kwargs.get("non_blocking")
        if waits or source.is_meta:
            made = to_host(source).detach().to(dtype=dtype, device="meta" if source.is_meta else "cpu", copy=True)
            if not source.is_meta and torch.device(kwargs.get("device") or DEVICE).type != "meta":
                _watched[-1].note_copy(waits=bool(source.ndim) or not stays)
            elif torch.device(kwargs.get("device") or DEVICE).type == "meta":
                return made.to("meta")
            return PretendTensor(made) if stays else made
        empty = torch.empty_like(to_host(source), dtype=dtype)
        target: Tensor = PretendTensor(empty) if stays else empty
        _copy(target, source)
        return target
    target, source = args[0], args[1]
    waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if waits:
        _watched[-1].note_copy(waits=True)
        to_host(target).copy_(to_host(source))
    else:
        _copy(target, source)
    return target


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy without waiting."""
    _watched[-1].note_copy(waits=False)
    pretend_streams.copy_later(to_host(target), to_host(source), to_device=isinstance(target, PretendTensor))


def _by_flags(places: Sequence[Tensor | None]) -> bool:
    return any(place is not None and place.dtype in (torch.bool, torch.uint8) for place in places)


def _wrap(result: Any, args: Sequence[Any]) -> Any:
    """Wrap what came out; what an operation changed in place and returns is the wrapper that it was given."""
    known = {id(to_host(leaf)): leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, PretendTensor)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, PretendTensor):
            return value
        if value.dtype in _watched[-1].lacking:
            raise TypeError(f"{DEVICE} has no {value.dtype}")
        return known[id(value)] if id(value) in known else PretendTensor(value)

    return pytree.tree_map(wrap, result)


def _line() -> str:
    """The innermost line of fisherkit that is being run."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else "?"


def _register() -> torch.library.Library:
    """Make tensors where no tensor of the device is given, on whatever thread."""
    library = torch.library.Library("aten", "IMPL")

    def factory(operation: Any) -> Any:
        return lambda *args, **kwargs: _run(operation, args, {**kwargs, "device": DEVICE})

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        _move(torch.ops.aten.copy_.default, (target, source, non_blocking), {}, True)
        return target

    library.impl("empty.memory_format", factory(torch.ops.aten.empty.memory_format), "Lazy", allow_override=True)
    library.impl("empty_strided", factory(torch.ops.aten.empty_strided.default), "Lazy", allow_override=True)
    library.impl("_copy_from", copy_from, "Lazy", allow_override=True)
    return library


_library: list[torch.library.Library] = []


@contextmanager
def plugged_in(monkeypatch: pytest.MonkeyPatch, *, memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Let fisherkit find the device as ``auto``, with so much memory, and with streams."""
    if not _library:
        _library.append(_register())
    streams, find, available = copies.stream_module, device.choose_device, memory.available_bytes
    monkeypatch.setattr(copies, "stream_module", lambda one: pretend_streams if one == DEVICE else streams(one))
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("fisherkit."):
            if getattr(module, "choose_device", None) is find:
                monkeypatch.setattr(
                    module, "choose_device", lambda wanted: DEVICE if wanted == "auto" else find(wanted)
                )
            if getattr(module, "available_bytes", None) is available:
                monkeypatch.setattr(
                    module, "available_bytes", lambda one: memory_bytes if one == DEVICE else available(one)
                )
    yield
    pretend_streams.reset()


@contextmanager
def watching(*, lacking: Sequence[torch.dtype] = ()) -> Iterator[Traffic]:
    """Count, and refuse dtypes that the device lacks."""
    _watched.append(Traffic(lacking=frozenset(lacking)))
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def move(model: torch.nn.Module) -> torch.nn.Module:
    """Put a model's parameters and buffers on the device; those that share memory still do."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.nn.Parameter(to_pretend(parameter), parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), made)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = to_pretend(buffer)
    return model
