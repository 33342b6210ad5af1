"""Points of a sweep that differ in density alone: what each keeps of a tensor is found once, when the first is read.

One byte per entry is remembered until the last point has read the tensor. Where there is no room for it, every point
finds out for itself: slower, and the same.
"""

from collections.abc import Sequence

from fisherkit.floats import Stored
from fisherkit.kernels.nested import MOST, Depths
from fisherkit.kernels.tensor_pair import TensorPair
from fisherkit.kernels.top_k import quota
from fisherkit.methods.merge.fapm_prune import Pruner
from fisherkit.methods.merge.pair_run import refuse_bad_values, untouched
from fisherkit.pairs.nested import depths_by_quota, depths_by_threshold, take_deeper


class NestedPoints:
    """Points that differ in density alone; asked by one thread at a time.

    Args:
        pruners: of the points, which select; their metric and seed are the same.
        room: bytes that may be remembered.
    """

    def __init__(self, pruners: Sequence[Pruner], room: int) -> None:
        assert 0 < len(pruners) <= MOST
        self._pruners = sorted(pruners, key=lambda pruner: pruner.share)
        self._room = room
        self._depths: dict[str, Depths] = {}
        self._waiting: dict[str, set[int]] = {}

    def read(self, pruner: Pruner, name: str) -> Stored:
        """Return a tensor as a point has it, flat; valid until the next call.

        Args:
            pruner: of the point.
            name: the tensor.

        Raises:
            CheckpointError: NaN or infinities that --nan does not allow.
        """
        run, options = pruner.run, pruner.options
        data = untouched(run.tensors, name, run.chosen, options)
        if data is not None:
            return data
        pair, place = pruner.load(name).pair, self._place(pruner)
        depths = self._depths.get(name)
        if depths is None:
            depths, bad = self._find(name, pair)
            refuse_bad_values(run.tensors, name, bad, options)
            self._remember(name, depths)
        take_deeper(pair, depths, len(self._pruners) - 1 - place, run.tensors.pool)
        self._forget(name, place)
        return pair.base

    def _place(self, pruner: Pruner) -> int:
        return next(at for at, own in enumerate(self._pruners) if own is pruner)

    def _find(self, name: str, pair: TensorPair) -> tuple[Depths, int]:
        """Depths of a tensor, and how many of its entries are not finite."""
        first = self._pruners[0]
        pool, seed, stream = first.run.tensors.pool, first.options.seed, first.stream(name)
        if first.shared is None:
            quotas = [quota(pruner.share, pair.base.size) for pruner in self._pruners]
            return depths_by_quota(pair, quotas, pool, seed=seed, stream=stream)
        thresholds = [pruner.shared.threshold(name) for pruner in self._pruners if pruner.shared is not None]
        return depths_by_threshold(pair, thresholds, pool, seed=seed, stream=stream)

    def _remember(self, name: str, depths: Depths) -> None:
        if depths.nbytes + sum(held.nbytes for held in self._depths.values()) <= self._room:
            self._depths[name] = depths
            self._waiting[name] = set(range(len(self._pruners)))

    def _forget(self, name: str, place: int) -> None:
        """Drop the depths of a tensor when every point has read it."""
        waiting = self._waiting.get(name, set())
        waiting.discard(place)
        if not waiting:
            self._depths.pop(name, None)
            self._waiting.pop(name, None)
