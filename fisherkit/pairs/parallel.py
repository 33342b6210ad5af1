"""A few threads that share the blocks of one tensor. numpy lets go of the interpreter inside of its loops."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.floats import Stored
from fisherkit.kernels.prune_scores import BLOCK, Scratch

Result = TypeVar("Result")
_MOST = 8  # more cores than the memory can feed
_TRANSFER = 8 << 20  # bytes read or written per call of a thread


class BlockPool:
    """Threads with memory of their own for one block each. Close it, or use it as a context."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or min(_MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fisherkit")
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def scratch(self) -> Scratch:
        """The calling thread's memory."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch  # type: ignore[no-any-return]

    def map(self, function: Callable[[int, int], Result], count: int, step: int = BLOCK) -> list[Result]:
        """``function(start, stop)`` for each stretch of ``step`` out of ``count``, in order; at least one call."""
        starts = range(0, max(count, 1), step)
        if len(starts) == 1:
            return [function(0, count)]
        return list(self._pool.map(lambda start: function(start, min(start + step, count)), starts))

    def read(self, reader: ArrayReader, name: str, out: Stored) -> None:
        """Fill the flat ``out`` with the whole of a tensor."""
        step = max(1, _TRANSFER // max(out.itemsize, 1))
        self.map(lambda start, stop: reader.read_into(name, out[start:stop], start), out.size, step)

    def write(self, put: Callable[[Stored, int], None], data: Stored) -> None:
        """Hand all of ``data`` to ``put(part, start)``."""
        step = max(1, _TRANSFER // max(data.itemsize, 1))
        self.map(lambda start, stop: put(data[start:stop], start), data.size, step)


class BufferPool:
    """Two flat buffers that tensor after tensor is read into: one allocation for a whole run."""

    def __init__(self) -> None:
        self._bytes: dict[str, np.ndarray] = {}

    def take(self, role: str, count: int, kind: "np.dtype[np.generic]") -> Stored:
        """A flat array of ``count`` elements; valid until the next call for the same role."""
        nbytes = count * kind.itemsize
        if role not in self._bytes or self._bytes[role].size < nbytes:
            self._bytes.pop(role, None)
            self._bytes[role] = np.empty(nbytes, np.uint8)
        return self._bytes[role][:nbytes].view(kind)

    def holds(self, role: str, data: Stored) -> bool:
        """Whether ``data`` lies in a role's buffer."""
        return role in self._bytes and bool(np.may_share_memory(self._bytes[role], data))


def starts(count: int, step: int = BLOCK) -> Iterator[int]:
    """Where the stretches of ``BlockPool.map`` begin."""
    return iter(range(0, max(count, 1), step))
