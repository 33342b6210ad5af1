"""Both checkpoints, tensor after tensor, in two buffers: what is read next is fetched by the system meanwhile.

Threads that take whole tensors side by side have buffers of their own.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self
from weakref import WeakSet

from fisherkit.checkpoint.headers import TensorInfo
from fisherkit.errors import CheckpointError
from fisherkit.floats import FLOATING, STORED, Stored
from fisherkit.kernels.tensor_pair import TensorPair, magnitude_sum, nonfinite, round_to_base
from fisherkit.pairs.pair import Pair
from fisherkit.pairs.parallel import BlockPool, BufferPool

AHEAD_BYTES = 256 << 20
"""How much of the files to come the system is asked for."""
_SIDE_BY_SIDE_BYTES = 32 << 20


class Tensors:
    """Reads what a pair of checkpoints holds; one tensor is valid at a time, in each thread.

    Attributes:
        checkpoints: BASE and FT.
        pool: threads.
        in_use: held by whoever reads and computes, where several threads do.
    """

    def __init__(self, checkpoints: Pair, pool: BlockPool) -> None:
        self.checkpoints = checkpoints
        self.pool = pool
        self.in_use = threading.Lock()
        self._local = threading.local()
        self._held: WeakSet[BufferPool] = WeakSet()  # of all threads that are there
        self._means: dict[str, float] = {}  # of tensors that are finite throughout, and may be loaded again
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="fisherkit-ahead")
        self._tuned = frozenset(checkpoints.tuned.names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ahead.shutdown(cancel_futures=True)

    @property
    def _buffers(self) -> BufferPool:
        """Memory of the calling thread."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = BufferPool()
            self._held.add(self._local.buffers)
        return self._local.buffers  # type: ignore[no-any-return]

    def release(self) -> None:
        """Give the buffers of all threads back; no tensor is valid any more."""
        for buffers in tuple(self._held):
            buffers.release()

    def is_small(self, name: str) -> bool:
        """Return whether a tensor is small enough for each thread to hold one."""
        return self.info(name).nbytes <= _SIDE_BY_SIDE_BYTES

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of the base's tensor."""
        return self.checkpoints.base.info(name)

    def has_tuned(self, name: str) -> bool:
        """Return whether FT has values for a tensor."""
        return name in self._tuned

    def walk(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the names, while the system reads ahead of them."""
        asked, ahead = 0, 0
        for at, name in enumerate(names):
            while asked < len(names) and (ahead < AHEAD_BYTES or asked <= at):
                ahead += self.info(names[asked]).nbytes
                self._ahead.submit(self._prefetch, names[asked])
                asked += 1
            yield name
            ahead -= self.info(name).nbytes

    def _prefetch(self, name: str) -> None:
        self.checkpoints.base.prefetch(name)
        if self.has_tuned(name):
            self.checkpoints.tuned.prefetch(name)

    def base(self, name: str) -> Stored:
        """Read the base's tensor, flat."""
        info = self.info(name)
        out = self._buffers.take("base", info.numel, STORED[info.dtype])
        self.pool.read(self.checkpoints.base, name, out)
        return out

    def load(
        self, name: str, metric: str = "fapm", *, keep_nonfinite: bool = False, mean: float | None = None
    ) -> TensorPair:
        """Read a floating tensor of both checkpoints, and take the mean of the base's finite magnitudes.

        Args:
            name: a tensor that both have.
            metric: goes into the result.
            keep_nonfinite: allow NaN and infinities in the base.
            mean: if it is known already.

        Raises:
            CheckpointError: the base holds NaN or infinities.
        """
        base = self.base(name)
        code = self.info(name).dtype
        tuned = self.checkpoints.tuned.load(name, base, self.pool, self._buffers)
        if mean is None and name not in self._means:
            mean, bad = self._mean_magnitude(base, code)
            if bad and not keep_nonfinite:
                self.refuse_nonfinite(name, "BASE", base, code)
            if not bad:
                self._means[name] = mean
        mean = self._means[name] if mean is None else mean
        return TensorPair(base, code, tuned, self.checkpoints.tuned.code(name), metric, mean)

    def in_bases_type(self, pair: TensorPair) -> tuple[TensorPair, int, int]:
        """Return the pair in the base's type, how many of FT's entries differed before, and how many no longer do."""
        tuned = self._buffers.take("rounded", pair.base.size, pair.base.dtype)
        counts = self.pool.map(
            lambda start, stop: round_to_base(pair.part(start, stop), tuned[start:stop]), pair.base.size
        )
        changed, lost = (sum(column) for column in zip(*counts, strict=True))
        return replace(pair, tuned=tuned, tuned_code=pair.base_code), changed, lost

    def _mean_magnitude(self, base: Stored, code: str) -> tuple[float, int]:
        """Mean of the finite magnitudes, and how many entries are not finite."""
        sums = self.pool.map(lambda start, stop: magnitude_sum(base[start:stop], code, self.pool.scratch), base.size)
        bad = sum(count for _, count in sums)
        return sum(total for total, _ in sums) / max(base.size - bad, 1), bad

    def refuse_nonfinite(self, name: str, role: str, stored: Stored, code: str) -> None:
        """Refuse NaN and infinities in a flat tensor.

        Args:
            name: the tensor.
            role: whose values they are, ``BASE`` or ``FT``.
            stored: the values.
            code: their safetensors code.

        Raises:
            CheckpointError: there are some; says how many and where.
        """
        found = nonfinite(stored, code)
        if found.size:
            where = self.info(name).file if role == "BASE" else self.checkpoints.tuned_source.path
            raise CheckpointError(
                f"{where}: {role}'s tensor {name!r} has {found.size} NaN or infinite entries, the first at index "
                f"{found[0]}; mend it, or --nan keep-base to take BASE there"
            )


def is_floating(info: TensorInfo) -> bool:
    """Return whether a tensor holds weights to compute with."""
    return info.dtype in FLOATING
