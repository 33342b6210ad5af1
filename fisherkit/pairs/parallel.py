"""Threads that share the blocks of one tensor, or take whole tensors side by side.

numpy lets go of the interpreter inside of its loops.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.descriptors import cores
from fisherkit.floats import Stored
from fisherkit.kernels.prune_scores import BLOCK, Scratch

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST = 16  # more cores than the memory can feed
_TRANSFER = 8 << 20  # bytes that a thread reads or writes at a time


class BlockPool:
    """Threads with memory of their own for one block each. Close it, or use it as a context.

    Attributes:
        threads: how many.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or min(_MOST, cores())
        self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="fisherkit")
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._executor.shutdown(cancel_futures=True)

    def side_by_side(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield ``function(item)`` in order, of items that are taken by one thread each, which shares nothing.

        What a thread maps meanwhile it does itself. At most two items per thread are under way.

        Args:
            function: called by the threads.
            items: asked for one by one, shortly before their turn.
        """
        under_way: deque[Future[Result]] = deque()
        try:
            for item in items:
                under_way.append(self._executor.submit(self._alone, function, item))
                if len(under_way) >= 2 * self.threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            _end(under_way)

    def _alone(self, function: Callable[[Item], Result], item: Item) -> Result:
        self._local.is_alone = True
        try:
            return function(item)
        finally:
            self._local.is_alone = False

    @property
    def scratch(self) -> Scratch:
        """Memory of the calling thread."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch  # type: ignore[no-any-return]

    def map(self, function: Callable[[int, int], Result], count: int, step: int = BLOCK) -> list[Result]:
        """Return ``function(start, stop)`` for each block of ``step`` out of ``count``, in order; at least one call.

        Args:
            function: called by the threads.
            count: entries in all.
            step: entries of a block.
        """
        starts = block_starts(count, step)
        if len(starts) == 1 or getattr(self._local, "is_alone", False):
            return [function(start, min(start + step, count)) for start in starts]
        under_way = [self._executor.submit(function, start, min(start + step, count)) for start in starts]
        try:
            return [future.result() for future in under_way]
        finally:
            _end(under_way)

    def transfer(self, data: Stored, move: Callable[[Stored, int], object]) -> None:
        """Read or write a whole tensor in parts.

        Args:
            data: [n] its entries, flat.
            move: called with each part of them and the index of its first entry.
        """
        step = max(1, _TRANSFER // max(data.itemsize, 1))
        self.map(lambda start, stop: move(data[start:stop], start), data.size, step)

    def read(self, reader: ArrayReader, name: str, out: Stored) -> None:
        """Fill the flat ``out`` with the whole of a tensor."""
        self.transfer(out, lambda part, start: reader.read_into(name, part, start))


def _end(futures: Collection[Future[Any]]) -> None:
    """Return when none of them runs any more: only then may a caller, after an error too, close the files they use."""
    for future in futures:
        future.cancel()
    wait(futures)


def block_starts(count: int, step: int = BLOCK) -> range:
    """Return where the blocks of ``BlockPool.map`` begin; an empty tensor has one block."""
    return range(0, max(count, 1), step)


class BufferPool:
    """Flat buffers by role that tensor after tensor is read into, until they are released."""

    def __init__(self) -> None:
        self._bytes: dict[str, np.ndarray] = {}

    def take(self, role: str, count: int, kind: "np.dtype[np.generic]") -> Stored:
        """Return a flat array of ``count`` elements; valid until the next call for the same role.

        Args:
            role: name of the buffer.
            count: elements.
            kind: their type.
        """
        nbytes = count * kind.itemsize
        if role not in self._bytes or self._bytes[role].size < nbytes:
            self._bytes.pop(role, None)  # dropped first, or both would be in memory
            self._bytes[role] = np.empty(nbytes, np.uint8)
        return self._bytes[role][:nbytes].view(kind)

    def release(self) -> None:
        """Give the memory back; what was taken is not valid any more."""
        self._bytes.clear()
