"""Tensors of a checkpoint as numpy arrays of what is stored: read without torch, whole or in part, from any thread.

A bfloat16 tensor comes as its bits in uint16 (see fisherkit.floats). Files of torch's kind need torch to be understood,
which is imported for them alone.
"""

import contextlib
import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from fisherkit.checkpoint.descriptors import OpenFiles
from fisherkit.checkpoint.dtypes import DTYPES
from fisherkit.checkpoint.headers import TensorInfo
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.errors import CheckpointError
from fisherkit.floats import STORED, Stored

if TYPE_CHECKING:
    from torch import Tensor


class ArrayReader:
    """Reads tensors of ``index``; any number of threads may read at once. Close it after the last read."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._files = OpenFiles(os.O_RDONLY | os.O_CLOEXEC)
        self._loaded: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.close()
        self._loaded.clear()

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor; raises CheckpointError if there is none of that name."""
        info = self.index.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.index.path}: has no tensor {name!r}")
        return info

    def read(self, name: str) -> Stored:
        """Read the whole tensor, in its shape.

        Raises:
            CheckpointError: no such tensor, a type that numpy cannot store, or the file ends early.
        """
        info = self.info(name)
        out = np.empty(info.numel, self._stored(info))
        self.read_into(name, out)
        return out.reshape(info.shape)

    def read_into(self, name: str, out: Stored, start: int = 0) -> None:
        """Fill the flat ``out`` with the tensor's elements from ``start`` on, in memory order.

        Raises:
            CheckpointError: as for read.
            IndexError: the tensor has no such elements.
        """
        info = self.info(name)
        kind = self._stored(info)
        if out.dtype != kind or not 0 <= start <= start + out.size <= info.numel:
            wanted = f"elements {start} to {start + out.size} as {out.dtype}"
            raise IndexError(f"{wanted} of {name!r}, which has {info.numel} of {kind}")
        if self.index.kind == "torch":
            out.view(np.uint8)[:] = self._torch_bytes(name)[start * kind.itemsize : start * kind.itemsize + out.nbytes]
        else:
            self._read_bytes(info, out, info.start + start * kind.itemsize)

    def prefetch(self, name: str) -> None:
        """Have the system read the tensor ahead; says nothing if it will not."""
        info = self.info(name)
        if self.index.kind == "safetensors" and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError, ValueError):
                os.posix_fadvise(self._files.descriptor(info.file), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)

    def _stored(self, info: TensorInfo) -> "np.dtype[np.generic]":
        kind = STORED.get(info.dtype)
        if kind is None or DTYPES[info.dtype].bits != 8 * kind.itemsize:
            raise CheckpointError(f"{info.file}: tensor {info.name!r} is {info.dtype}, which cannot be read here")
        return kind

    def _read_bytes(self, info: TensorInfo, out: Stored, at: int) -> None:
        view = out.view(np.uint8).data if out.size else memoryview(b"")
        try:
            if self._files.fill(info.file, view, at) < len(view):
                raise CheckpointError(f"{info.file}: ends inside of tensor {info.name!r}; fetch it again")
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read: {error.strerror}") from None

    def _torch_bytes(self, name: str) -> Stored:
        import torch

        from fisherkit.checkpoint.pickles import load_torch_file

        if not self._loaded:
            for file in self.index.files:
                self._loaded |= load_torch_file(file)
        return self._loaded[name].contiguous().reshape(-1).view(torch.uint8).numpy()
