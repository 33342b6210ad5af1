"""Agreement of two tensors on which entries matter: rank correlation, and overlap of the largest entries.

Both tensors have the same shape and are read flat. Entries are compared by magnitude in float32; what is not finite is
zero here. Selections are exact, with ties broken by index, and never sort or copy the whole tensor: the bits of a
non-negative float32 order as the numbers do, so two counting passes over 16 bits each find any order statistic.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 20
_HALF = 16  # bits per counting pass


def rank_correlation(a: Tensor, b: Tensor, *, sample: int = 1_000_000, seed: int = 0) -> float:
    """Return Spearman's rank correlation of two tensors of one shape; ties share the mean of their ranks.

    Above ``sample`` entries it is taken on so many positions drawn with ``seed``. NaN when either side is constant.

    Args:
        a: any shape and dtype.
        b: of the same shape.
        sample: how many positions are compared at most.
        seed: of these positions.
    """
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    if flat_a.numel() > sample:
        picked = torch.randint(flat_a.numel(), (sample,), generator=torch.Generator().manual_seed(seed))
        flat_a, flat_b = flat_a[picked], flat_b[picked]
    if flat_a.numel() < 2:
        return float("nan")
    ranks = torch.stack([mean_ranks(_magnitude(flat_a)), mean_ranks(_magnitude(flat_b))])
    ranks -= ranks.mean(dim=1, keepdim=True)
    scale = ranks.square().sum(dim=1).prod().sqrt()
    return float((ranks[0] * ranks[1]).sum() / scale)


def mean_ranks(values: Tensor) -> Tensor:
    """Return ranks from 0 of a vector [n], in float64; equal values share the mean of the ranks they take up."""
    ordered, order = values.sort()
    group = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    counts = group.bincount().double()
    shared = counts.cumsum(0) - (counts + 1) / 2
    return torch.empty_like(shared[group]).scatter_(0, order, shared[group])


def top_overlap(a: Tensor, b: Tensor, fractions: Sequence[float]) -> list[float]:
    """Return the share of a's largest entries that are among b's largest too, for each fraction; NaN for empty tensors.

    The largest ``round(fraction * n)`` entries, at least one, are taken on both sides; two unrelated tensors overlap by
    the fraction itself.

    Args:
        a: any shape and dtype.
        b: of the same shape.
        fractions: above 0 and at most 1.
    """
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    if not flat_a.numel():
        return [float("nan")] * len(fractions)
    high_a, high_b = _count_high(flat_a), _count_high(flat_b)
    overlaps = []
    for fraction in fractions:
        k = max(1, round(fraction * flat_a.numel()))
        chosen_a = _largest(flat_a, *_threshold(flat_a, high_a, k))
        chosen_b = _largest(flat_b, *_threshold(flat_b, high_b, k))
        overlaps.append(sum(int((x & y).sum()) for x, y in zip(chosen_a, chosen_b, strict=True)) / k)
    return overlaps


def _magnitude(block: Tensor) -> Tensor:
    return block.float().abs().nan_to_num_(0.0, 0.0, 0.0)


def _bits(flat: Tensor) -> Iterator[Tensor]:
    """Yield the bits of the magnitudes as int32, block by block."""
    for start in range(0, flat.numel(), _BLOCK):
        yield _magnitude(flat[start : start + _BLOCK]).view(torch.int32)


def _count_high(flat: Tensor) -> Tensor:
    """Count the entries by the upper half of their bits: counts[2**16]."""
    counts = torch.zeros(1 << _HALF, dtype=torch.int64)
    for bits in _bits(flat):
        counts += torch.bincount(bits >> _HALF, minlength=1 << _HALF)
    return counts


def _threshold(flat: Tensor, high: Tensor, k: int) -> tuple[int, int]:
    """Bits of the k-th largest entry, and how many of the entries that equal it belong to the largest k."""
    upper, left = _pick(high, k)
    low = torch.zeros(1 << _HALF, dtype=torch.int64)
    for bits in _bits(flat):
        low += torch.bincount(bits[bits >> _HALF == upper] & 0xFFFF, minlength=1 << _HALF)
    lower, left = _pick(low, left)
    return (upper << _HALF) | lower, left


def _pick(counts: Tensor, k: int) -> tuple[int, int]:
    """Index at which counting down from the top reaches k, and how many are still wanted at that index."""
    reached = counts.flip(0).cumsum(0)
    step = int(torch.searchsorted(reached, k))
    above = int(reached[step - 1]) if step else 0
    return counts.numel() - 1 - step, k - above


def _largest(flat: Tensor, threshold: int, ties: int) -> Iterator[Tensor]:
    """Block by block, whether an entry is above the threshold or among the first so many that equal it."""
    seen = 0
    for bits in _bits(flat):
        equal = bits == threshold
        yield (bits > threshold) | (equal & (equal.cumsum(0) + seen <= ties))
        seen += int(equal.sum())
