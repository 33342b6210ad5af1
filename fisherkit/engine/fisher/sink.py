"""Destination of finished Fisher values: the output file, with statistics for the sidecar kept on the way."""

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fisherkit.checkpoint.descriptors import file_threads
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.model.copies import HostCopy, host_bytes, to_host
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.skeleton import Skeleton, TargetTensor
from fisherkit.engine.ranks.ranks import Ranks
from fisherkit.engine.ranks.shared_file import SharedFile
from fisherkit.errors import FisherkitError
from fisherkit.kernels.side_by_side import side_by_side
from fisherkit.kernels.stats import Histogram, TensorStats, tensor_stats

TOPS = (0.01, 0.1, 0.3)
"""Fractions of the largest entries whose share of the sum (mass) is noted per tensor."""
_PART_OF_MEMORY = 8  # of the host's that is free, for values on their way from a device to the file


class FisherSink:
    """Writes means of squared gradients under checkpoint names; statistics are of the values before rounding.

    Values on a device are rounded there, and written by other threads when they have arrived.

    Args:
        skeleton: the model; it knows the checkpoint names of a parameter's values.
        writer: of the output file; it rounds to the stored dtype.
        tensors: that are written; values of others are dropped (a fused parameter may hold more than was asked for).
    """

    def __init__(
        self, skeleton: Skeleton, writer: StreamedWriter | SharedFile, tensors: Iterable[TargetTensor]
    ) -> None:
        self._skeleton, self._writer = skeleton, writer
        self._wanted = {tensor.name: tensor for tensor in tensors}
        self.figures: dict[str, dict[str, Any]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._behind = ThreadPoolExecutor(file_threads(), thread_name_prefix="sink")  # begins with the first use
        self._coming: deque[tuple[Future[None], int]] = deque()
        self._settling = threading.Lock()
        self._most_coming = available_bytes(torch.device("cpu")) // _PART_OF_MEMORY

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._behind.shutdown(wait=True, cancel_futures=True)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the ``state`` of an earlier process."""
        self.figures = dict(state["tensors"])
        self._histograms = {"": Histogram.from_json(state["histogram"])}
        self._writer.mark_written(self.figures)

    def reset(self) -> None:
        """Forget all values: another engine starts over and overwrites what is in the file."""
        self._settle()
        self.figures, self._histograms = {}, {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Write one block's values as checkpoint tensors.

        Args:
            values: parameter name -> mean squared gradient, float32, shaped like the parameter.

        Raises:
            FisherkitError: a value is NaN or infinite.
        """
        wanted = {name: value for name, value in self._skeleton.tensors_of(values).items() if name in self._wanted}
        on_cpu = all(value.device.type == "cpu" for value in wanted.values())
        sizes = [value.numel() for value in wanted.values()]
        kept = side_by_side(self._keep, list(wanted.items()), sizes) if on_cpu else map(self._keep, wanted.items())
        for (name, value), stats in zip(wanted.items(), kept, strict=True):
            self.figures[name] = figures_of(stats, tuple(value.shape))
            self._histograms[name] = stats.histogram

    def exchange(self, ranks: Ranks) -> None:
        """Bring what all ranks added since the last time to the first one; all of them call it at the same point."""
        assert isinstance(self._writer, SharedFile)
        self._settle()
        self._writer.exchange()
        fresh = {name: self.figures[name] for name in self._histograms if name}
        own = sum((one for name, one in self._histograms.items() if name), Histogram())
        known = self._histograms.get("", Histogram())
        every = ranks.gather((fresh, own.to_json()))
        if ranks.is_first:
            added = {name: figures for one, _ in every for name, figures in one.items()}
            self.figures = {name: figures for name, figures in self.figures.items() if name not in added}
            self.figures |= {name: added[name] for name in self._wanted if name in added}
            known = sum((Histogram.from_json(histogram) for _, histogram in every), known)
        self._histograms = {"": known}

    def state(self) -> dict[str, Any]:
        """Return JSON that ``restore`` takes in another process, once all that was added is synced."""
        return {"tensors": dict(self.figures), "histogram": self.histogram().to_json()}

    def sync(self) -> None:
        """Wait until everything added before the call is on the disk."""
        self._settle()
        self._writer.sync()

    def histogram(self) -> Histogram:
        """Return the histogram of all entries of all tensors so far."""
        merged = sum(self._histograms.values(), Histogram())
        self._histograms = {"": merged}
        return merged

    def _keep(self, named: tuple[str, Tensor]) -> TensorStats:
        name, value = named
        stats = tensor_stats(value)
        if stats.nonfinite:
            raise FisherkitError(
                f"{name}: {stats.nonfinite:,} squared gradients overflow float32; try --reduction mean, "
                "a shorter --max-length, or --dtype float32"
            )
        if value.device.type == "cpu":
            self._writer.write(name, value)
        else:
            self._send(name, value.to(self._writer.dtype_of(name)))  # rounded there: half the way to go
        return stats

    def _send(self, name: str, value: Tensor) -> None:
        """Let a value go to the host and to the file, once there is room for it among those on their way."""
        nbytes = host_bytes(value, value.device)
        while (ahead := self._on_their_way()) and nbytes + sum(size for _, size in ahead) > self._most_coming:
            ahead[0][0].result()
        self._coming.append((self._behind.submit(self._write, name, to_host([value])), nbytes))

    def _on_their_way(self) -> list[tuple[Future[None], int]]:
        return [(written, size) for written, size in list(self._coming) if not written.done()]

    def _settle(self) -> None:
        with self._settling:  # a commit may be under way
            for written, _ in [self._coming.popleft() for _ in range(len(self._coming))]:
                written.result()

    def _write(self, name: str, copy: HostCopy) -> None:
        self._writer.write(name, copy.wait()[0])


def figures_of(stats: TensorStats, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return what the sidecar notes of one tensor."""
    return {
        "shape": list(shape),
        "sum": stats.sum,
        "mean": stats.mean,
        "max": stats.max,
        "zeros": stats.zeros,
        "nonfinite": stats.nonfinite,
        "mass": {str(top): stats.histogram.mass(top) for top in TOPS},
    }


class NoSink:
    """Takes the place of a FisherSink where no Fisher is measured."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Never called: there are no values."""

    def reset(self) -> None:
        """Forget nothing."""

    def exchange(self, ranks: Ranks) -> None:
        """Bring nothing to the first rank."""

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def sync(self) -> None:
        """Wait for nothing."""


def store_code(store: str) -> str:
    """Return the safetensors dtype code of ``--store``."""
    return {"bf16": "BF16", "fp32": "F32"}[store]


def store_bytes(store: str) -> int:
    """Return the bytes per weight of ``--store``."""
    return TensorSpec("", store_code(store), ()).nbytes
