"""What torch.cuda is to CUDA, for the pretend accelerator: streams and events; copies happen when they must have.

A copy that does not block leaves rubbish in its target until something waits for it: an event, or a stream. So a
forgotten wait shows in the numbers, as it may on a GPU, but every time. Computing itself happens at once.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Stream:
    """Copies in the order in which they were asked for.

    Attributes:
        keeps: tensors that must not be freed before what the stream was given is done.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._todo: list[Callable[[], None]] = []
        self._done = 0
        self._lock = threading.RLock()
        self.keeps: list[Tensor] = []

    def add(self, copy: Callable[[], None]) -> None:
        with self._lock:
            self._todo.append(copy)

    def length(self) -> int:
        return len(self._todo)

    def run(self, count: int) -> None:
        """Do what was asked for, up to the ``count``-th."""
        with self._lock:
            while self._done < count:
                self._todo[self._done]()
                self._todo[self._done] = _nothing
                self._done += 1

    def wait_event(self, event: "Event") -> None:
        event.happen()

    def wait_stream(self, other: "Stream") -> None:
        other.run(other.length())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.run(self.length())


class Event:
    """A place in a stream."""

    def __init__(self, **options: Any) -> None:
        self._place: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        self._place = stream, stream.length()

    def wait(self, stream: Stream | None = None) -> None:
        self.happen()

    def happen(self) -> None:
        if self._place is not None:
            stream, count = self._place
            stream.run(count)

    def query(self) -> bool:
        self.happen()
        return True

    def synchronize(self) -> None:
        self.happen()


_default = Stream()
_local = threading.local()


def reset() -> None:
    """Finish everything."""
    _default.synchronize()


def _nothing() -> None:
    pass


def current_stream(device: torch.device | None = None) -> Stream:
    return getattr(_local, "stream", _default)


@contextmanager
def stream(one: Stream) -> Iterator[None]:
    before = current_stream()
    _local.stream = one
    try:
        yield
    finally:
        _local.stream = before


def synchronize(device: torch.device | None = None) -> None:
    _default.synchronize()


def copy_later(target: Tensor, source: Tensor, *, to_device: bool) -> None:
    """Leave rubbish in ``target`` until the copy is waited for; what computes reads its own stream's copies at once."""
    here = current_stream()
    if here is _default and to_device:
        target.copy_(source)
        return
    if not to_device:
        source = source.clone()  # its stream may go on to change it
    target.view(-1).view(torch.uint8).fill_(0xFF) if target.is_contiguous() and target.ndim else target.zero_()
    here.add(lambda: _finish(target, source))


def _finish(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)
