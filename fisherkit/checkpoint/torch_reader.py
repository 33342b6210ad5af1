"""Tensors of a checkpoint, one at a time and only when asked for.

Bytes of `.safetensors` go straight into the memory of a fresh tensor, with positioned reads: a map of the file would
count as resident memory of ours, and models are larger than that. Torch files are mapped, since only torch
knows their inside.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fisherkit.checkpoint.descriptors import OpenFiles, file_threads
from fisherkit.checkpoint.dtypes import torch_dtype
from fisherkit.checkpoint.headers import TensorInfo
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.checkpoint.pickles import load_torch_file
from fisherkit.errors import CheckpointError

_ALIGN = 64  # bytes; what vector instructions like
_PART_BYTES = 32 << 20  # of a group of tensors that a thread reads at a time


class Reader:
    """Reads tensors of ``index`` on the CPU, in the type they have on disk; any number of threads may read at once.

    A TensorSource (see checkpoint.tensor_source). Close it after the last read only. Tensors stay valid after that.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._files = OpenFiles(os.O_RDONLY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._loaded: dict[Path, dict[str, Tensor]] = {}
        threads = file_threads()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read") if threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors in file order, each read when it is reached."""
        return ((name, self.read(name)) for name in self.index.tensors)

    def read(self, name: str) -> Tensor:
        """Read the whole tensor.

        Raises:
            CheckpointError: no such tensor, a type that torch lacks, or the file ends early.
        """
        info = self._info(name)
        if self.index.kind == "torch":
            return self._load(info.file)[name]
        return self._read_bytes(info, info.shape, info.start)

    def read_many(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole tensors that share one piece of memory.

        A group of layers comes and goes in one allocation, which goes back to the system at once; hundreds of middling
        ones would leave holes behind that grow a long run's memory by half.

        Raises:
            CheckpointError: as for read.
        """
        infos = [self._info(name) for name in names]
        if self._files.closed:
            raise ValueError(f"{self.index.path}: already closed")
        if self.index.kind == "torch":
            return {info.name: self.read(info.name) for info in infos}
        pieces = shared_memory([info.nbytes for info in infos])
        tensors = {
            info.name: piece.view(_dtype(info)).view(info.shape) for info, piece in zip(infos, pieces, strict=True)
        }
        parts = [
            (info, piece.numpy().data[start : start + _PART_BYTES], info.start + start)
            for info, piece in zip(infos, pieces, strict=True)
            for start in range(0, info.nbytes, _PART_BYTES)
        ]
        early: Counter[str] = Counter()
        run = map if self._pool is None else self._pool.map
        for (info, *_), missing in zip(parts, run(self._missing, parts), strict=True):
            early[info.name] += missing
        for info in infos:
            if early[info.name]:
                raise _ends_early(info, early[info.name])
        return tensors

    def read_into(self, name: str, memory: Tensor) -> Tensor:
        """Read the whole tensor into bytes [n] uint8 of its size, aligned, and return it; safetensors only.

        Raises:
            CheckpointError: as for read.
        """
        info = self._info(name)
        return self._read_bytes(info, info.shape, info.start, memory)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (exclusive) of the first dimension; no other byte is read.

        Raises:
            IndexError: the tensor is a scalar or does not have these rows.
            CheckpointError: as for read.
        """
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {name!r}, whose shape is {list(info.shape)}")
        if self.index.kind == "torch":
            return self._load(info.file)[name][start:stop]
        row_bytes = info.nbytes // max(info.shape[0], 1)
        return self._read_bytes(info, (stop - start, *info.shape[1:]), info.start + start * row_bytes)

    def fingerprint(self) -> str:
        """Return the fingerprint of the checkpoint, see CheckpointIndex.fingerprint."""
        return self.index.fingerprint()

    def close(self) -> None:
        """Close the files; reading afterwards raises ValueError."""
        if self._pool is not None:
            self._pool.shutdown()
        self._files.close()
        self._loaded.clear()

    def _info(self, name: str) -> TensorInfo:
        info = self.index.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.index.path}: has no tensor {name!r}")
        return info

    def _load(self, file: Path) -> dict[str, Tensor]:
        with self._lock:
            if self._files.closed:
                raise ValueError(f"{file}: already closed")
            if file not in self._loaded:
                self._loaded[file] = load_torch_file(file)
            return self._loaded[file]

    def _read_bytes(
        self, info: TensorInfo, shape: tuple[int, ...], offset: int, memory: Tensor | None = None
    ) -> Tensor:
        if memory is None:
            tensor = torch.empty(shape, dtype=_dtype(info))
            memory = tensor.reshape(-1).view(torch.uint8)
        else:
            tensor = memory.view(_dtype(info)).view(shape)
        early = self._missing((info, memory.numpy().data, offset))
        if early:
            raise _ends_early(info, early)
        return tensor

    def _missing(self, part: tuple[TensorInfo, memoryview, int]) -> int:
        """Read bytes of a tensor's file from an offset on; return how many are not there."""
        info, view, offset = part
        try:
            return len(view) - self._files.fill(info.file, view, offset)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read: {error.strerror}") from None


def _dtype(info: TensorInfo) -> torch.dtype:
    dtype = torch_dtype(info.dtype)
    if dtype is None:
        raise refuse_type(info)
    return dtype


def _ends_early(info: TensorInfo, early: int) -> CheckpointError:
    return CheckpointError(f"{info.file}: ends {early} bytes before tensor {info.name!r} does; fetch it again")


def shared_memory(sizes: Sequence[int]) -> list[Tensor]:
    """Return a piece of fresh memory [n] uint8 for each size in bytes, all from one allocation, each aligned."""
    starts = [0, *accumulate(-(-size // _ALIGN) * _ALIGN for size in sizes)]
    memory = torch.empty(starts[-1], dtype=torch.uint8)
    return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def refuse_type(info: TensorInfo) -> CheckpointError:
    """Return the error for a tensor whose type torch lacks."""
    return CheckpointError(f"{info.file}: tensor {info.name!r} has type {info.dtype}, which this torch cannot hold")
