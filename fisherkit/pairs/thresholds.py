"""Exact thresholds over many tensors at once, found by streaming: nothing is sorted, nothing is held but counts.

A *group* is the tensors that share one quota: a layer, or the whole model. A first pass takes the mean and a sample of
every tensor; then every group's scores are counted inside the threshold range that the samples gave, once or twice.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from fisherkit.floats import Floats
from fisherkit.kernels.prune import block_scores, sample_scores
from fisherkit.kernels.tensor_pair import TensorPair
from fisherkit.kernels.top_k import (
    NOTHING,
    SAMPLE,
    HistogramSelect,
    Threshold,
    exact_thresholds,
    threshold_range,
)
from fisherkit.pairs.reader import Tensors
from fisherkit.progress import Track

Group = TypeVar("Group", bound=Hashable)
_Selects = Mapping[tuple[Group, int], HistogramSelect]
"""By group, and the number of the quota in its list."""


@dataclass(frozen=True)
class ScoredTensors(Generic[Group]):
    """Tensors of a run, with how they are read and scored.

    Attributes:
        names: in order.
        group: the group of each name.
        load: from a name and its mean magnitude to the tensor; the mean is None in the first pass.
        stream: the random stream of each name.
        seed: of random scores.
    """

    names: Sequence[str]
    group: Mapping[str, Group]
    load: Callable[[str, float | None], TensorPair]
    stream: Mapping[str, int]
    seed: int


def find_thresholds(
    tensors: Tensors, scored: ScoredTensors[Group], quotas: Mapping[Group, Sequence[int]], track: Track
) -> tuple[dict[Group, list[Threshold]], dict[str, float]]:
    """Return a threshold per quota for every group, and the means of the tensors.

    Args:
        tensors: what is read.
        scored: how.
        quotas: numbers of entries to keep, by group.
        track: progress in tensors.
    """
    means, samples = _survey(tensors, scored, track)
    selects: dict[tuple[Group, int], HistogramSelect] = {}
    for group, numbers in quotas.items():
        size = sum(tensors.info(name).numel for name in scored.names if scored.group[name] == group)
        sample = np.concatenate(samples[group])
        for at, kept in enumerate(numbers):
            if kept:
                selects[group, at] = HistogramSelect(threshold_range(sample, kept, size), kept)
    found = exact_thresholds(selects, lambda pending: _show_all(tensors, scored, means, pending, track))
    keep_nothing = Threshold(NOTHING.high, 0)
    thresholds = {
        group: [found.get((group, at), keep_nothing) for at in range(len(numbers))] for group, numbers in quotas.items()
    }
    return thresholds, means


def _survey(
    tensors: Tensors, scored: ScoredTensors[Group], track: Track
) -> tuple[dict[str, float], dict[Group, list[Floats]]]:
    """Means by name, and for every group scores sampled from its tensors in proportion to their sizes."""
    sizes: dict[Group, int] = {}
    for name in scored.names:
        sizes[scored.group[name]] = sizes.get(scored.group[name], 0) + tensors.info(name).numel
    means: dict[str, float] = {}
    samples: dict[Group, list[Floats]] = {group: [] for group in sizes}
    for at, name in enumerate(tensors.walk(scored.names)):
        track("surveying", at, len(scored.names))
        pair, group = scored.load(name, None), scored.group[name]
        means[name] = pair.mean
        wanted = -(-4 * SAMPLE * pair.base.size // max(sizes[group], 1))
        samples[group].append(sample_scores(pair, wanted, scored.seed, scored.stream[name]))
    track("surveying", len(scored.names), len(scored.names))
    return means, samples


def _show_all(
    tensors: Tensors, scored: ScoredTensors[Group], means: Mapping[str, float], pending: _Selects[Group], track: Track
) -> None:
    """Show the scores of every tensor to the pending selects of its group; read no tensor whose group has none."""
    for at, name in enumerate(tensors.walk(scored.names)):
        track("counting", at, len(scored.names))
        selects = [select for (group, _), select in pending.items() if group == scored.group[name]]
        if selects:
            _show(tensors, scored, name, means[name], selects)
    track("counting", len(scored.names), len(scored.names))


def _show(
    tensors: Tensors, scored: ScoredTensors[Group], name: str, mean: float, selects: Sequence[HistogramSelect]
) -> None:
    pair, pool = scored.load(name, mean), tensors.pool

    def show(start: int, stop: int) -> None:
        scores = block_scores(pair.part(start, stop), pool.scratch, scored.seed, scored.stream[name], start)
        for select in selects:
            select.show(scores)

    pool.map(show, pair.base.size)
