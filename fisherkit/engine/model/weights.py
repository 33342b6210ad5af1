"""Weights of groups of blocks: read ahead from a checkpoint, put on the device, dropped again."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fisherkit.checkpoint.tensor_source import TensorSource
from fisherkit.engine.model.copies import Sender, Sent
from fisherkit.engine.model.memory import give_back
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import CheckpointError


class Weights:
    """One group of blocks holds its weights at a time; the next one's are read while it computes.

    A device with streams has the next one's sent to it meanwhile. The page cache is what keeps weights in host memory
    between the sweeps, as far as they fit. ``keep`` leaves them on the device instead, for accelerators that have room
    for the whole model.

    Args:
        skeleton: the model that they are put into.
        source: gives the tensors; stays open.
        device: to compute on.
        keep: see above.
    """

    def __init__(self, skeleton: Skeleton, source: TensorSource, device: torch.device, *, keep: bool = False) -> None:
        self._skeleton = skeleton
        self._source = source
        self._device = device
        self._keep = keep
        self._checked: set[str] = set()
        self._held: set[int] = set()
        self._sender = Sender(device)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: tuple[tuple[int, ...], Future[Sent]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def load_outer(self) -> None:
        """Load embeddings, norms, head and computed buffers; tied weights are tied afterwards."""
        skeleton = self._skeleton
        tensors = self._read(skeleton.outer_tensors())
        skeleton.check_tied(tensors)
        skeleton.load(tensors, self._device)
        for module in skeleton.model.modules():
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers.get(name)
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self._device)
        skeleton.tie()
        skeleton.check_loaded(None)

    def load_all(self) -> None:
        """Load everything; weights that blocks share are tied before any is missed."""
        self.load_outer()
        count = len(self._skeleton.blocks)
        for block in range(count):
            self._fill([block], [block + 1] if block + 1 < count else [])
        self._skeleton.tie()
        for block in range(count):
            self._skeleton.check_loaded(block)

    def enter(self, blocks: Sequence[int], then: Sequence[int] = ()) -> None:
        """Load the weights of ``blocks``, and start to read those of ``then``."""
        fresh = not self._held.issuperset(blocks)
        self._fill(blocks, then)
        if fresh:
            for block in blocks:
                self._skeleton.check_loaded(block)

    def _fill(self, blocks: Sequence[int], then: Sequence[int]) -> None:
        group = tuple(blocks)
        if not self._held.issuperset(group):
            self._skeleton.load(self._take(group), self._device)
            self._held.update(group)
        if then:
            self.read_ahead(then)

    def read_ahead(self, blocks: Sequence[int]) -> None:
        """Start to read the weights of these blocks, which will be entered next."""
        group = tuple(blocks)
        if not self._held.issuperset(group) and (self._ahead is None or self._ahead[0] != group):
            self._ahead = group, self._pool.submit(self._fetch, group)

    def leave(self, blocks: Sequence[int]) -> None:
        """Drop the weights of these blocks, unless all weights stay on the device."""
        if not self._keep:
            for block in blocks:
                self._skeleton.unload(block)
            self._held.difference_update(blocks)
            give_back()

    def leave_outer(self) -> None:
        """Drop what load_outer loaded, but for computed buffers."""
        self._skeleton.unload_outer()
        give_back()

    def leave_all(self) -> None:
        """Drop all that load_all loaded."""
        for block in sorted(self._held):
            self._skeleton.unload(block)
        self._held.clear()
        self.leave_outer()

    def _take(self, group: tuple[int, ...]) -> dict[str, Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != group:
            ahead = group, self._pool.submit(self._fetch, group)  # behind what is being read: one sends at a time
        return ahead[1].result().receive()

    def _fetch(self, group: tuple[int, ...]) -> Sent:
        """Read a group, and begin to send it where the device takes it beside its computing."""
        return self._sender.send(self._read(self._skeleton.block_tensors(group)))

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors, and look for NaN, Inf and complex weights in each the first time.

        What is converted as it is loaded gets memory of its own: it goes back then, and not when the others do.
        """
        sources = self._skeleton.names
        converted = [name for name in names if sources.parameter_of[name] in sources.converted]
        others = [name for name in names if sources.parameter_of[name] not in sources.converted]
        tensors = {name: tensor for part in (others, converted) for name, tensor in self._read_part(part).items()}
        for name in [name for name in names if name not in self._checked]:
            self._check(name, tensors[name])
            self._checked.add(name)
        return tensors

    def _read_part(self, names: Sequence[str]) -> dict[str, Tensor]:
        return self._source.read_many(names) if names else {}

    def _check(self, name: str, tensor: Tensor) -> None:
        where = self._source.index.tensors[name].file
        if tensor.is_complex():  # loading it would drop the imaginary parts
            raise CheckpointError(f"{where}: {name} is complex; the weights of a language model are real")
        if tensor.is_floating_point() and tensor.numel() and not _all_finite(tensor):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{where}: {name} holds {count:,} weights that are NaN or infinite; "
                "the checkpoint is damaged, nothing measured on it would mean anything"
            )


def _all_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())
