"""Exact thresholds over many tensors at once, found by streaming: nothing is sorted, nothing is held but counts.

A *group* is the tensors that share one quota: a layer, or the whole model. A first pass takes the mean and a sample of
every tensor; then every group's scores are tallied inside the threshold_range that the samples gave, once or twice.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from fisherkit.floats import Floats
from fisherkit.kernels.prune import TensorPair, block_scores, sample_scores
from fisherkit.kernels.top_k import SAMPLE, Counted, HistogramSelect, Threshold, threshold_range
from fisherkit.pairs.reader import Tensors

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class Stream(Generic[Group]):
    """How the tensors of a run are read and scored.

    Attributes:
        names: in order.
        group: of each name.
        load: both sides of a tensor; ``mean`` is given from the second pass on.
        stream: the random stream of each name.
        seed: of random scores.
    """

    names: Sequence[str]
    group: Mapping[str, Group]
    load: Callable[[str, float | None], TensorPair]
    stream: Mapping[str, int]
    seed: int


def find_cuts(
    tensors: Tensors,
    stream: Stream[Group],
    quotas: Mapping[Group, Sequence[int]],
    track: Callable[[str, int, int], None],
) -> tuple[dict[Group, list[Threshold]], dict[str, float]]:
    """For every group a cut per quota, and the means of the tensors.

    Args:
        tensors: what is read.
        stream: how.
        quotas: numbers of entries to keep, by group; all groups have as many.
        track: progress in tensors.
    """
    means, samples = _survey(tensors, stream, track)
    tallies: dict[Group, list[HistogramSelect | Threshold]] = {}
    for group, wanted in quotas.items():
        size = sum(tensors.info(name).numel for name in stream.names if stream.group[name] == group)
        scores = np.concatenate(samples[group])
        tallies[group] = [
            HistogramSelect(threshold_range(scores, kept, size), kept) if kept else _NOTHING for kept in wanted
        ]
    while any(isinstance(tally, HistogramSelect) for group in tallies.values() for tally in group):
        for at, name in enumerate(tensors.walk(stream.names)):
            track("counting", at, len(stream.names))
            open_ones = [tally for tally in tallies[stream.group[name]] if isinstance(tally, HistogramSelect)]
            if open_ones:
                _count(tensors, stream, name, means[name], open_ones)
        tallies = {group: [_narrowed(tally) for tally in row] for group, row in tallies.items()}
    track("counting", len(stream.names), len(stream.names))
    return {group: [cut for cut in row if isinstance(cut, Threshold)] for group, row in tallies.items()}, means


_NOTHING = Threshold(np.float32(np.inf), 0)


def _narrowed(tally: HistogramSelect | Threshold) -> HistogramSelect | Threshold:
    return tally if isinstance(tally, Threshold) else tally.narrow() or tally


def _survey(
    tensors: Tensors, stream: Stream[Group], track: Callable[[str, int, int], None]
) -> tuple[dict[str, float], dict[Group, list[Floats]]]:
    """Means, and for every group scores sampled from its tensors in proportion to their sizes."""
    sizes: dict[Group, int] = {}
    for name in stream.names:
        sizes[stream.group[name]] = sizes.get(stream.group[name], 0) + tensors.info(name).numel
    means: dict[str, float] = {}
    samples: dict[Group, list[Floats]] = {group: [] for group in sizes}
    for at, name in enumerate(tensors.walk(stream.names)):
        track("surveying", at, len(stream.names))
        sides = stream.load(name, None)
        means[name] = sides.mean
        share = -(-4 * SAMPLE * sides.base.size // max(sizes[stream.group[name]], 1))
        samples[stream.group[name]].append(sample_scores(sides, share, stream.seed, stream.stream[name]))
    track("surveying", len(stream.names), len(stream.names))
    return means, samples


def _count(tensors: Tensors, stream: Stream[Group], name: str, mean: float, tallies: Sequence[HistogramSelect]) -> None:
    sides, team = stream.load(name, mean), tensors.team

    def count(start: int, stop: int) -> list[Counted]:
        scores = block_scores(sides.part(start, stop), team.scratch, stream.seed, stream.stream[name], start)
        return [tally.count(scores) for tally in tallies]

    for counted in team.map(count, sides.base.size):
        for tally, part in zip(tallies, counted, strict=True):
            tally.add(part)
