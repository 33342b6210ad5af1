"""Statistics of one tensor in one pass: sum, maximum, zeros, what is not finite, and a histogram of magnitudes.

Entries are taken in float32 and added in float64, a few megabytes at a time, so that a tensor of any size costs the
same memory. All figures are of magnitudes ``|x|``: for a Fisher that is the Fisher, for plain weights their size.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fisherkit.kernels.compiled import count_16_bits
from fisherkit.kernels.devices import wide_device
from fisherkit.kernels.histogram import BINS, BINS_PER_OCTAVE, MANTISSA_SHIFT, Histogram

__all__ = ["BINS_PER_OCTAVE", "Histogram", "TensorStats", "tensor_stats"]

_16_BITS = 1 << 16  # different numbers of 16 bits
_PATTERNS = 2048  # bins of a float32 without its sign, infinities and NaN included
_BLOCK = 1 << 17  # entries at a time; with all that is made of them they stay in a core's own cache
_BLOCK_ON_DEVICE = 1 << 24  # few launches on an accelerator


@dataclass(frozen=True, kw_only=True)
class TensorStats:
    """Statistics of a tensor; ``a + b`` describes both parts of a tensor that was read in pieces.

    Attributes:
        numel: number of entries.
        sum: sum of the finite magnitudes, in float64.
        max: largest finite magnitude; 0.0 when there is none.
        zeros: entries that are exactly zero.
        negative: finite entries below zero: none in a Fisher, about half in a weight matrix.
        nonfinite: infinities and NaN; they count in ``numel`` and nowhere else.
        histogram: of the finite magnitudes.
    """

    numel: int = 0
    sum: float = 0.0
    max: float = 0.0
    zeros: int = 0
    negative: int = 0
    nonfinite: int = 0
    histogram: Histogram = field(default_factory=Histogram)

    @property
    def mean(self) -> float:
        """``sum / numel``; 0.0 for an empty tensor."""
        return self.sum / self.numel if self.numel else 0.0

    def __add__(self, other: "TensorStats") -> "TensorStats":
        return TensorStats(
            numel=self.numel + other.numel,
            sum=self.sum + other.sum,
            max=max(self.max, other.max),
            zeros=self.zeros + other.zeros,
            negative=self.negative + other.negative,
            nonfinite=self.nonfinite + other.nonfinite,
            histogram=self.histogram + other.histogram,
        )


def tensor_stats(tensor: Tensor) -> TensorStats:
    """Return the statistics of a tensor of any shape, dtype and device, in constant memory where it is contiguous.

    What does not fit a float32 counts as not finite. Of complex entries the absolute values are taken.
    """
    if tensor.dtype in (torch.bfloat16, torch.float16) and tensor.device.type == "cpu" and tensor.numel() >= _16_BITS:
        return _stats_of_16_bits(tensor)
    found = _Sums(wide_device(tensor.device))
    on_cpu = tensor.device.type == "cpu"
    add, step = (_add_block_on_cpu_, _BLOCK) if on_cpu else (_add_block_, _BLOCK_ON_DEVICE)
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), step):
        block = flat[start : start + step].to(found.counts.device)
        add(found, (block.abs() if block.is_complex() else block).float())
    counts, sums = found.counts.cpu(), found.sums.cpu()
    zeros, negative, largest = found.others.cpu().tolist()
    return TensorStats(
        numel=tensor.numel(),
        sum=float(sums[:BINS].sum()),
        max=largest,
        zeros=int(zeros),
        negative=int(negative),
        nonfinite=int(counts[BINS:].sum()),
        histogram=_histogram(counts[:BINS].tolist(), sums[:BINS].tolist()),
    )


class _Sums:
    """What blocks are added to: counts[2048] and sums[2048] by bin, and others[3] = (zeros, negative, max)."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(_PATTERNS, dtype=torch.int64, device=device)
        self.sums = torch.zeros(_PATTERNS, dtype=torch.float64, device=device)
        self.others = torch.zeros(3, dtype=torch.float64, device=device)

    def add_to_bins(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """Add flat float32 magnitudes; return the bin of each, and how many of them each bin has got."""
        # The sign is gone, so the bits order as the numbers do, and patterns from BINS up are infinities and NaN.
        bins = size.view(torch.int32) >> MANTISSA_SHIFT
        counts = torch.bincount(bins, minlength=_PATTERNS)
        self.counts += counts
        self.sums += torch.bincount(bins, weights=size.double(), minlength=_PATTERNS)
        return bins, counts


def _stats_of_16_bits(tensor: Tensor) -> TensorStats:
    """Return the same of a tensor of 16-bit numbers, which are only counted: there are but 65,536 of them.

    A seventh of the time. Sums differ from those of adding one entry after the other in the last digits of float64.
    """
    # Not by torch: its threads share every conversion, and wait for each other by spinning.
    counts = torch.from_numpy(count_16_bits(tensor.detach().reshape(-1).view(torch.int16).numpy().view(np.uint16)))
    values = torch.arange(_16_BITS, dtype=torch.int32).to(torch.int16).view(tensor.dtype).float()
    size = values.abs()
    bins = (size.view(torch.int32) >> MANTISSA_SHIFT).long()
    is_finite = bins < BINS
    amounts = torch.where(is_finite, size, 0.0).double() * counts
    in_bins = torch.zeros(_PATTERNS, dtype=torch.int64).index_add_(0, bins, counts)
    sums = torch.zeros(_PATTERNS, dtype=torch.float64).index_add_(0, bins, amounts)
    there = is_finite & (counts > 0)
    return TensorStats(
        numel=tensor.numel(),
        sum=float(sums[:BINS].sum()),
        max=float(size[there].max()) if bool(there.any()) else 0.0,
        zeros=int(counts[size == 0].sum()),
        negative=int(counts[(values < 0) & is_finite].sum()),
        nonfinite=int(in_bins[BINS:].sum()),
        histogram=_histogram(in_bins[:BINS].tolist(), sums[:BINS].tolist()),
    )


def _add_block_(found: _Sums, block: Tensor) -> None:
    """Add a flat float32 block; nothing waits for a device."""
    size = block.abs()
    bins, _ = found.add_to_bins(size)
    found.others[0] += (size == 0).sum()
    found.others[1] += ((block < 0) & (bins < BINS)).sum()
    found.others[2] = torch.maximum(found.others[2], torch.where(bins < BINS, size, 0.0).amax().double())


def _add_block_on_cpu_(found: _Sums, block: Tensor) -> None:
    """Do the same in a third of the time: extremes and the lowest bin say what there is no need to look for."""
    low, high = torch.aminmax(block)
    if not (low.isfinite() and high.isfinite()):
        _add_block_(found, block)
        return
    size = block.abs()
    _, counts = found.add_to_bins(size)
    if counts[0]:
        found.others[0] += (size == 0).sum()
    if low < 0:
        found.others[1] += (block < 0).sum()
    found.others[2] = torch.maximum(found.others[2], torch.maximum(high, -low).double())


def _histogram(counts: list[int], sums: list[float]) -> Histogram:
    return Histogram(tuple((i, n, s) for i, (n, s) in enumerate(zip(counts, sums, strict=True)) if n))
