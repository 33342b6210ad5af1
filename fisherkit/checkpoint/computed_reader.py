"""Tensors of torch from a checkpoint that is computed while it is read, in numpy's arrays of what is stored."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from fisherkit.checkpoint.dtypes import torch_dtype
from fisherkit.checkpoint.index import CheckpointIndex, TensorInfo
from fisherkit.checkpoint.torch_reader import refuse_type, shared_memory
from fisherkit.errors import CheckpointError
from fisherkit.floats import STORED, Stored


class Computed(Protocol):
    """A checkpoint that can be read without torch; see pairs.virtual."""

    @property
    def index(self) -> CheckpointIndex:
        """Names, shapes and types."""
        ...

    def walk(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the names, while the system reads ahead of them."""
        ...

    def read_into(self, name: str, out: Stored) -> None:
        """Fill the flat ``out`` with a whole tensor, as it is stored."""
        ...

    def fingerprint(self) -> str:
        """Return a text that changes when the values do."""
        ...


class ComputedReader:
    """A TensorSource (see checkpoint.tensor_source) of a computed checkpoint.

    Args:
        checkpoint: what is read; whoever opened it closes it.
    """

    def __init__(self, checkpoint: Computed) -> None:
        self._checkpoint = checkpoint

    @property
    def index(self) -> CheckpointIndex:
        """Names, shapes and types of the tensors."""
        return self._checkpoint.index

    def read_many(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Compute whole tensors, which share one piece of memory.

        Raises:
            CheckpointError: no such tensor, a type that torch lacks, a file that cannot be read, or values that are
                refused.
        """
        infos = self.index.tensors
        for name in names:
            if name not in infos:
                raise CheckpointError(f"{self.index.path}: has no tensor {name!r}")
        pieces = shared_memory([infos[name].nbytes for name in names])
        return {
            name: self._compute(infos[name], piece)
            for name, piece in zip(self._checkpoint.walk(names), pieces, strict=True)
        }

    def _compute(self, info: TensorInfo, memory: Tensor) -> Tensor:
        dtype = torch_dtype(info.dtype)
        if dtype is None or info.dtype not in STORED:
            raise refuse_type(info)
        self._checkpoint.read_into(info.name, memory.numpy().view(STORED[info.dtype]))
        return memory.view(dtype).view(info.shape)

    def fingerprint(self) -> str:
        """Return a text that changes when the values do."""
        return self._checkpoint.fingerprint()

    def close(self) -> None:
        """Leave the files to whoever opened them."""
