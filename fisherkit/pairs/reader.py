"""Both sides of a pair, tensor after tensor, in two buffers: what is read next is fetched by the system meanwhile."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

from fisherkit.checkpoint.headers import TensorInfo
from fisherkit.errors import CheckpointError
from fisherkit.floats import FLOATING, STORED, Stored
from fisherkit.kernels.prune import TensorPair, magnitude_sum, nonfinite, round_to_base
from fisherkit.pairs.pair import Pair
from fisherkit.pairs.parallel import BlockPool, BufferPool

AHEAD_BYTES = 256 << 20
"""How much of the files to come the system is asked for."""
_LENT_BYTES = 64 << 20
"""Tensors up to this size have two buffers to be in, so that one is written while the next one is computed."""


class Tensors:
    """Reads what a pair holds; one tensor is valid at a time."""

    def __init__(self, pair: Pair, team: BlockPool) -> None:
        self.pair = pair
        self.team = team
        self._memory = BufferPool()
        self._turn = 0
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="fisherkit-ahead")
        self._tuned = frozenset(pair.tuned.names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ahead.shutdown(cancel_futures=True)

    def info(self, name: str) -> TensorInfo:
        """Of the base's tensor."""
        return self.pair.base.info(name)

    def has_tuned(self, name: str) -> bool:
        """Whether FT has values for it."""
        return name in self._tuned

    def walk(self, names: Sequence[str]) -> Iterator[str]:
        """The names, while the system reads ahead of them."""
        asked, ahead = 0, 0
        for at, name in enumerate(names):
            while asked < len(names) and (ahead < AHEAD_BYTES or asked <= at):
                ahead += self.info(names[asked]).nbytes
                self._ahead.submit(self._prefetch, names[asked])
                asked += 1
            yield name
            ahead -= self.info(name).nbytes

    def _prefetch(self, name: str) -> None:
        self.pair.base.prefetch(name)
        if self.has_tuned(name):
            self.pair.tuned.prefetch(name)

    def base(self, name: str) -> Stored:
        """The base's tensor, flat."""
        info = self.info(name)
        role = f"base {self._turn}" if info.nbytes <= _LENT_BYTES else "base"
        out = self._memory.take(role, info.numel, STORED[info.dtype])
        self.team.read(self.pair.base, name, out)
        return out

    def double_buffer(self, data: Stored) -> bool:
        """Leave ``data`` as it is until the next call: the tensors up to then are read elsewhere.

        False if that is not possible: ``data`` is not a tensor of the base's side, or a large one.
        """
        if not self._memory.holds(f"base {self._turn}", data):
            return False
        self._turn ^= 1
        return True

    def sides(
        self, name: str, metric: str = "fapm", *, keep_nonfinite: bool = False, mean: float | None = None
    ) -> TensorPair:
        """Both sides of a floating tensor, and the mean of the base's finite magnitudes.

        Args:
            name: a tensor that both sides have.
            metric: goes into the result.
            keep_nonfinite: allow NaN and infinities in the base.
            mean: if it is known already.

        Raises:
            CheckpointError: the base holds NaN or infinities.
        """
        w = self.base(name)
        code = self.info(name).dtype
        f = self.pair.tuned.load(name, w, self.team, self._memory)
        if mean is None:
            mean, bad = self._mean(w, code)
            if bad and not keep_nonfinite:
                self.refuse_nonfinite(name, "BASE", w, code)
        return TensorPair(w, code, f, self.pair.tuned.code(name), metric, mean)

    def in_bases_type(self, sides: TensorPair) -> tuple[TensorPair, int, int]:
        """Both sides in the base's type, how many of FT's entries differed before, and how many no longer do."""
        f = self._memory.take("rounded", sides.base.size, sides.base.dtype)
        parts = self.team.map(
            lambda start, stop: round_to_base(sides.part(start, stop), f[start:stop]), sides.base.size
        )
        changed, lost = (sum(column) for column in zip(*parts, strict=True))
        return replace(sides, tuned=f, tuned_code=sides.base_code), changed, lost

    def _mean(self, w: Stored, code: str) -> tuple[float, int]:
        parts = self.team.map(lambda start, stop: magnitude_sum(w[start:stop], code, self.team.scratch), w.size)
        bad = sum(count for _, count in parts)
        return sum(total for total, _ in parts) / max(w.size - bad, 1), bad

    def refuse_nonfinite(self, name: str, side: str, stored: Stored, code: str) -> None:
        """Raise CheckpointError if there are NaN or infinities in a flat tensor, and say which and where."""
        found = nonfinite(stored, code)
        if found.size:
            where = self.info(name).file if side == "BASE" else self.pair.tuned_source.path
            raise CheckpointError(
                f"{where}: {side}'s tensor {name!r} has {found.size} NaN or infinite entries, the first at index "
                f"{found[0]}; mend it, or --nan keep-base to take BASE there"
            )


def is_floating(info: TensorInfo) -> bool:
    """Whether a tensor holds weights to compute with."""
    return info.dtype in FLOATING
