"""Arguments of every block for every batch, recorded once and kept in the work folder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkit.engine.fisher.squared_gradients import trainable
from fisherkit.engine.sweep.job import Job
from fisherkit.engine.sweep.recorder import BlockCallRecorder, Record
from fisherkit.engine.sweep.spool import Spool


class Arguments:
    """Records of all batches; their tensors are spooled and come back only for the blocks that need them."""

    def __init__(self, job: Job, recorder: BlockCallRecorder) -> None:
        self._job, self._recorder = job, recorder
        self._records: list[Record] = []
        self._spool = Spool(job.work.folder / "arguments.bin", job.budget)

    def record(self, number: int) -> Tensor:
        """Record batch ``number`` (batches come in order); return the hidden states that enter the first block."""
        assert number == len(self._records)
        outer = self._job.plan.names([None])
        with trainable(self._job.skeleton.model, outer), torch.set_grad_enabled(bool(outer)):
            record, first = self._recorder.record(self._job.inputs(self._job.batches[number]))
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
            tensors[place] = self._spool.get(f"{number}.{place}")[0][0].to(self._job.device)
        return Record(record.calls, tensors, record.mappings, record.live)

    def close(self) -> None:
        """Give memory and disk back."""
        self._spool.remove()
