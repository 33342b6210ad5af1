"""Weights that the processes of one machine read together, each a part, into memory that all of them see.

The memory belongs to a file without a name (memfd), which the first process of the machine makes and the others open
through /proc. It goes back to the system when the last of them has dropped its tensors. So a machine reads a group's
weights once, and holds them once, however many processes it runs.
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherkit.checkpoint.dtypes import torch_dtype
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.engine.ranks.places import Place
from fisherkit.kernels.deal import deal

if TYPE_CHECKING:
    from fisherkit.engine.ranks.group import RankGroup

_ALIGN = 64  # bytes; what vector instructions like
_NONE = "none"


class SharedWeights:
    """A TensorSource of several processes; they ask for the same tensors in the same order, in any thread.

    Args:
        source: of this process.
        ranks: all processes.
        near: places of those on this machine, by rank.
        number: of this process among them.
    """

    def __init__(self, source: Reader, ranks: "RankGroup", near: Sequence[Place], number: int) -> None:
        self._source, self._ranks, self._near, self._number = source, ranks, near, number

    @property
    def index(self) -> CheckpointIndex:
        """Names, shapes and stored types of the tensors."""
        return self._source.index

    def fingerprint(self) -> str:
        """Return the fingerprint of the checkpoint."""
        return self._source.fingerprint()

    def close(self) -> None:
        """Close the files."""
        self._source.close()

    def read_many(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read whole tensors, together with the neighbours.

        Raises:
            CheckpointError: as for a source alone.
            RankFailedError: a neighbour could not read its part.
        """
        sizes = [self.index.tensors[name].nbytes if name in self.index.tensors else 0 for name in names]
        starts = [0, *accumulate(-(-size // _ALIGN) * _ALIGN for size in sizes)]
        # Files of torch's kind are mapped: the system reads them once by itself.
        alone = self.index.kind == "torch" or len(self._near) == 1 or not starts[-1]
        # Two threads may ask for different tensors at once.
        key = self._ranks.number(f"weights/{self._near[0].machine}/{self._near[0].pid}/{names[:1]}/{len(names)}")
        memory = None if alone else self._share_memory(key, starts[-1])
        if memory is None:
            self._ranks.read_bytes += sum(sizes)
            return self._source.read_many(names)
        pieces = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        own = deal(sizes, len(self._near))[self._number]
        for place in own:
            self._source.read_into(names[place], pieces[place])
        self._ranks.read_bytes += sum(sizes[place] for place in own)
        self._come_together(f"{key}/read")
        return {name: self._view(name, piece) for name, piece in zip(names, pieces, strict=True)}

    def _view(self, name: str, piece: Tensor) -> Tensor:
        info = self.index.tensors[name]
        dtype = torch_dtype(info.dtype)
        assert dtype is not None  # or it could not have been read
        return piece.view(dtype).view(info.shape)

    def _share_memory(self, key: str, size: int) -> Tensor | None:
        """Return bytes that all processes of the machine see; None where the system has no such memory for them."""
        descriptor = None
        if self._number == 0:
            descriptor = _make(size)
            self._ranks.put(key, _NONE if descriptor is None else str(descriptor))
        else:
            given = self._ranks.get(key)
            if given != _NONE:
                with suppress(OSError):
                    descriptor = os.open(f"/proc/{self._near[0].pid}/fd/{given}", os.O_RDWR | os.O_CLOEXEC)
        self._ranks.add(f"{key}/failed", descriptor is None)
        self._come_together(f"{key}/opened")
        try:
            if descriptor is None or self._ranks.add(f"{key}/failed", 0):
                return None
            return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _come_together(self, key: str) -> None:
        self._ranks.add(key, 1)
        self._ranks.wait(lambda: self._ranks.add(key, 0) >= len(self._near))


def _make(size: int) -> int | None:
    try:
        descriptor = os.memfd_create("fisherkit", os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # not Linux
        return None
    try:
        os.ftruncate(descriptor, size)
    except OSError:  # more than this process may write at all
        os.close(descriptor)
        return None
    return descriptor
