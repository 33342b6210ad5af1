"""Checkpoints that nobody wrote: BASE's tensors as a command would write them, computed when somebody reads them.

What is read is bit for bit what would lie on the disk, and costs no disk. One pair of open checkpoints serves any
number of them, say one per density: whoever reads them group by group of tensors finds the bytes in the page cache, so
that the disk is read once for all. No torch: see checkpoint.computed_reader for tensors of torch's kind.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.errors import CheckpointError
from fisherkit.floats import Stored, widen
from fisherkit.kernels.tensor_pair import TensorPair, converted
from fisherkit.pairs.pair import Pair, open_pair
from fisherkit.pairs.parallel import BlockPool
from fisherkit.pairs.reader import Tensors, is_floating


class VirtualCheckpoint:
    """Tensors by BASE's names, in BASE's types, each computed when it is read; any number of threads may ask.

    Args:
        tensors: the pair; it must stay open. Checkpoints of one pair wait for each other.
        compute: from a name to its flat stored entries, which may lie in a buffer of ``tensors``; None for BASE's.
        marks: gives a text that changes when the values do.
    """

    def __init__(self, tensors: Tensors, compute: Callable[[str], Stored | None], marks: Callable[[], str]) -> None:
        self._tensors = tensors
        self._compute = compute
        self._marks = marks

    @property
    def pair(self) -> Pair:
        """BASE and FT."""
        return self._tensors.checkpoints

    @property
    def index(self) -> CheckpointIndex:
        """Names, shapes and types: BASE's."""
        return self.pair.base.index

    def walk(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the names, while the system reads ahead of them."""
        return self._tensors.walk(names)

    def read_into(self, name: str, out: Stored) -> None:
        """Fill the flat ``out`` with a whole tensor.

        Args:
            name: one of BASE's.
            out: [n] of the stored type.

        Raises:
            CheckpointError: no such tensor, a file that cannot be read, or values that a command would refuse.
        """
        with self._tensors.in_use:
            data = self._compute(name)
            if data is None:
                self._tensors.pool.read(self.pair.base, name, out)
            else:
                out[:] = data

    def fingerprint(self) -> str:
        """Return a text that changes when the values do."""
        return self._marks()


@contextmanager
def open_tuned(base: str, tuned: str) -> Iterator[VirtualCheckpoint]:
    """Open FT itself in BASE's names and types: an adapter merged, a sparse delta put in, while it is read.

    Args:
        base: a checkpoint: folder, file, ``org/name`` or ``org/name@revision``.
        tuned: a PEFT adapter's folder, a file that ``fapm --sparse`` wrote, or a whole checkpoint.

    Raises:
        CheckpointError: one of them cannot be read, or they do not belong together.
    """
    with ExitStack() as stack:
        checkpoints = stack.enter_context(open_pair(base, tuned))
        tensors = stack.enter_context(Tensors(checkpoints, stack.enter_context(BlockPool())))
        yield VirtualCheckpoint(
            tensors,
            lambda name: _tuned_or_none(tensors, name),
            lambda: f"{checkpoints.base.index.fingerprint()} {checkpoints.tuned.fingerprint()}",
        )


def _tuned_or_none(tensors: Tensors, name: str) -> Stored | None:
    """FT's values of a tensor in BASE's type; None where it has none, or where they are no weights."""
    info = tensors.info(name)
    if not tensors.has_tuned(name) or not is_floating(info):
        return None
    pair = tensors.load(name, keep_nonfinite=True, mean=0.0)  # the mean, which nobody needs here, would cost a pass
    bad = take_tuned(pair, tensors.pool)
    if bad:
        raise CheckpointError(
            f"{tensors.checkpoints.tuned_source.path}: put together with {info.file.name}, {name!r} has {bad} entries "
            f"that are NaN or infinite in {info.dtype}"
        )
    return pair.base


def take_tuned(pair: TensorPair, pool: BlockPool) -> int:
    """Overwrite BASE's entries with FT's, in BASE's type; return how many are not finite there, and stay BASE's.

    Args:
        pair: a whole tensor.
        pool: threads.
    """

    def take(start: int, stop: int) -> int:
        part = pair.part(start, stop)
        taken = converted(part.tuned, part.tuned_code, part.base_code)
        finite = np.isfinite(widen(taken, part.base_code))
        np.copyto(part.base, taken, where=finite)
        return finite.size - int(np.count_nonzero(finite))

    return sum(pool.map(take, pair.base.size))
