"""Arguments of every block for every batch, recorded once and kept in the work folder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkit.engine.fisher.squared_gradients import trainable
from fisherkit.engine.sweep.feed import Feed
from fisherkit.engine.sweep.recorder import BlockCallRecorder, Record
from fisherkit.engine.sweep.spool import Spool


class Arguments:
    """Records of all batches; their tensors are spooled and come back only for the blocks that need them.

    Args:
        feed: the model and its batches.
        recorder: of that model.
        spool: fresh; removed by ``close``.
        outer: parameters outside of the blocks that are measured: what depends on them is marked in the records.
    """

    def __init__(self, feed: Feed, recorder: BlockCallRecorder, spool: Spool, outer: Sequence[str] = ()) -> None:
        self._feed, self._recorder = feed, recorder
        self._records: list[Record] = []
        self._spool = spool
        self._outer = outer

    def record(self, number: int) -> Tensor:
        """Record batch ``number`` (batches come in order); return the hidden states that enter the first block."""
        assert number == len(self._records)
        with trainable(self._feed.skeleton.model, self._outer), torch.set_grad_enabled(bool(self._outer)):
            record, first = self._recorder.record(self._feed.inputs(self._feed.batches[number]))
        live = frozenset(place for place, tensor in enumerate(record.tensors) if tensor.requires_grad)
        for place, tensor in enumerate(record.tensors):
            self._spool.put(f"{number}.{place}", [tensor])
        self._records.append(Record(record.calls, [], record.mappings, live))
        return first.detach()

    def get(self, number: int, blocks: Sequence[int]) -> Record:
        """Return the record of a batch with just the tensors that these blocks are called with, on the device."""
        record = self._records[number]
        needed = record.needs(blocks)
        tensors: list[Any] = [None] * (max(needed, default=-1) + 1)
        for place in needed:
            tensors[place] = self._spool.get(f"{number}.{place}", self._feed.device)[0][0]
        return Record(record.calls, tensors, record.mappings, record.live)

    def close(self) -> None:
        """Give memory and disk back."""
        self._spool.remove()
