"""Quotas that several tensors share, a layer's or the whole model's: their thresholds, and who keeps the ties."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from fisherkit.kernels.prune import block_scores
from fisherkit.kernels.top_k import Threshold, quota
from fisherkit.methods.merge.pair_run import Run, load_pair
from fisherkit.methods.merge.tensor_selection import Chosen
from fisherkit.options import FapmOptions
from fisherkit.options.merge import Scope
from fisherkit.pairs.prune import stream_of
from fisherkit.pairs.reader import Tensors
from fisherkit.pairs.rewrite import TensorRow
from fisherkit.pairs.thresholds import ScoredTensors, find_thresholds


class SharedThresholds:
    """Exact thresholds of groups of tensors, and how many entries that score just that may still be kept.

    These ties are kept in the order of the tensors, as long as the quota lasts; so tensors must come in the order of
    the checkpoint. Two tensors that BASE and FT both tie stay equal: the second keeps what the first did.
    """

    def __init__(
        self, thresholds: Mapping[str, Threshold], groups: Mapping[str, str], tied_pairs: Mapping[str, str]
    ) -> None:
        self._thresholds = thresholds
        self._groups = groups
        self._tied_to = {**tied_pairs, **{body: head for head, body in tied_pairs.items()}}
        self._spent: dict[str, int] = defaultdict(int)
        self._ties_of: dict[str, int] = {}

    def threshold(self, name: str) -> Threshold:
        """Return the threshold of a tensor, with the ties that it may keep: what it kept before, if it did."""
        group = self._groups[name]
        threshold = self._thresholds[group]
        if name in self._ties_of:
            return Threshold(threshold.at, self._ties_of[name])
        tied = self._tied_to.get(name)
        left = threshold.ties - self._spent[group]
        return Threshold(threshold.at, self._ties_of.get(tied, left) if tied is not None else left)

    def spend(self, name: str, ties: int) -> None:
        """Count the ties that a tensor has kept, once; those of the tensor it is tied to are counted already."""
        if name in self._ties_of:
            return
        if self._tied_to.get(name) not in self._ties_of:
            self._spent[self._groups[name]] += ties
        self._ties_of[name] = ties

    def recall(self, rows: Mapping[str, TensorRow]) -> None:
        """Count what tensors have kept in the run that this one goes on with."""
        for name, row in rows.items():
            if name in self._groups:
                self.spend(name, row.get("ties", 0))


def find_groups(chosen: Chosen, scope: Scope) -> dict[str, str]:
    """Return the group that each tensor shares its quota with: itself, its layer, or everything."""
    if scope == "tensor":
        return {name: name for name in chosen.names}
    return {name: chosen.places[name].layer_name if scope == "layer" else "" for name in chosen.names}


def group_sizes(tensors: Tensors, groups: Mapping[str, str]) -> dict[str, int]:
    """Return the number of entries by group."""
    sizes: dict[str, int] = defaultdict(int)
    for name, group in groups.items():
        sizes[group] += tensors.info(name).numel
    return sizes


def survey(
    run: Run, options: FapmOptions, shares: Sequence[Fraction]
) -> tuple[list[SharedThresholds], dict[str, float]]:
    """Read everything, and find the thresholds of shared quotas.

    Args:
        run: the pair.
        options: give metric, scope and seed.
        shares: of entries that are kept.

    Returns:
        Thresholds by share, and the mean magnitudes of the base's tensors.
    """
    groups = find_groups(run.chosen, options.scope)
    tied_pairs = run.checkpoints.tuned.tied_pairs
    scored = ScoredTensors(
        names=run.chosen.names,
        group=groups,
        load=lambda name, mean: (
            load_pair(run.tensors, name, options, metric=options.metric, mean=mean, selects=True).pair
        ),
        stream={name: random_stream(name, tied_pairs) for name in run.chosen.names},
        seed=options.seed,
    )
    sizes = group_sizes(run.tensors, groups)
    quotas = {group: [quota(share, size) for share in shares] for group, size in sizes.items()}
    found, means = find_thresholds(run.tensors, scored, quotas, run.request.track)
    by_share = [{group: thresholds[at] for group, thresholds in found.items()} for at in range(len(shares))]
    return [SharedThresholds(thresholds, groups, tied_pairs) for thresholds in by_share], means


def settle_ties(run: Run, options: FapmOptions, shared: Sequence[SharedThresholds], means: Mapping[str, float]) -> None:
    """Decide which tensor keeps how many ties, so that tensors may come in any order afterwards.

    Args:
        run: the pair.
        options: give metric, scope and seed.
        shared: changed: every tensor's ties are counted.
        means: mean magnitudes of the base's tensors.
    """
    for name in run.chosen.names:
        thresholds = [one.threshold(name) for one in shared]
        counts = [0] * len(thresholds)
        if any(threshold.ties for threshold in thresholds):
            counts = _count_ties(run, options, name, means[name], thresholds)
        for one, threshold, count in zip(shared, thresholds, counts, strict=True):
            one.spend(name, min(threshold.ties, count))


def _count_ties(run: Run, options: FapmOptions, name: str, mean: float, thresholds: Sequence[Threshold]) -> list[int]:
    """Count the entries of a tensor that score exactly each threshold."""
    pair = load_pair(run.tensors, name, options, metric=options.metric, mean=mean, selects=True).pair
    stream, pool = random_stream(name, run.checkpoints.tuned.tied_pairs), run.tensors.pool

    def count(start: int, stop: int) -> list[int]:
        scores = block_scores(pair.part(start, stop), pool.scratch, options.seed, stream, start)
        return [int(np.count_nonzero(scores == threshold.at)) for threshold in thresholds]

    return [sum(counts) for counts in zip(*pool.map(count, pair.base.size), strict=True)]


def random_stream(name: str, tied_pairs: Mapping[str, str]) -> int:
    """Return the random stream of a tensor; one for both where BASE and FT tie two."""
    return stream_of(tied_pairs.get(name, name))
