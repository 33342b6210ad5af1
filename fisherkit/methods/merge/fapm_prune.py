"""One tensor of ``fapm``: loaded, pruned by its quota, counted, and put into the figure and the sparse delta."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fisherkit.artefacts.sparse_writer import Entries
from fisherkit.floats import Stored
from fisherkit.kernels.density import DensityMap
from fisherkit.kernels.prune import SAMPLE_STREAM, block_scores
from fisherkit.kernels.prune_scores import Scratch
from fisherkit.kernels.tensor_pair import TensorPair, converted, sample_indices
from fisherkit.kernels.top_k import SAMPLE, quota
from fisherkit.methods.merge.pair_run import Loaded, Run, load_pair, refuse_bad_values, untouched
from fisherkit.methods.merge.quotas import SharedThresholds, random_stream, survey
from fisherkit.options import FapmOptions
from fisherkit.pairs.prune import Outcome, Pruning
from fisherkit.pairs.rewrite import Changed, TensorRow

DEFAULT_SPARSITY = 0.9
ADAPTER_SPARSITY = 0.1
"""A low-rank delta is spread over all entries: dropping most of it leaves nothing that was learnt."""


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Everything that decides how one run prunes its tensors.

    Attributes:
        run: the pair.
        options: of the command.
        pruning: whether results are written and listed.
        share: of the entries of a quota that is kept.
        shared: thresholds of quotas that several tensors share; None where every tensor has its own.
        means: mean magnitudes that are known already.
    """

    run: Run
    options: FapmOptions
    pruning: Pruning
    share: Fraction
    shared: SharedThresholds | None
    means: Mapping[str, float]

    def stream(self, name: str) -> int:
        """Return the random stream of a tensor."""
        return random_stream(name, self.run.checkpoints.tuned.tied_pairs)

    def load(self, name: str) -> Loaded:
        """Read a tensor of both checkpoints as the metric compares them."""
        return load_pair(
            self.run.tensors,
            name,
            self.options,
            metric=self.options.metric,
            mean=self.means.get(name),
            selects=self.options.selects,
        )

    def prune(self, name: str, pair: TensorPair) -> tuple[TensorPair, Outcome]:
        """Prune a tensor by its own quota, by a shared threshold, or by a metric that rescales.

        Args:
            name: the tensor.
            pair: its values; the base's are overwritten where ``pruning`` writes.
        """
        info, stream = self.run.tensors.info(name), self.stream(name)
        if not self.options.selects:
            columns = info.shape[-1] if len(info.shape) > 1 else math.prod(info.shape)
            return self.pruning.rescaled(pair, float(self.share), max(columns, 1), stream)
        if self.shared is None:
            return self.pruning.by_quota(pair, quota(self.share, info.numel), stream, lambda: self.load(name).pair)
        pair, outcome = self.pruning.by_threshold(pair, self.shared.threshold(name), stream)
        self.shared.spend(name, outcome.ties)
        return pair, outcome

    def row(self, name: str, outcome: Outcome, remarks: TensorRow) -> TensorRow:
        """Return what the report says of a tensor.

        Args:
            name: the tensor.
            outcome: of its pruning.
            remarks: of load_pair.
        """
        place, info = self.run.chosen.places[name], self.run.tensors.info(name)
        where = {"layer": place.layer, "module": place.module, "shape": list(info.shape), "weights": info.numel}
        ties = {"ties": outcome.ties} if self.shared is not None else {}
        lost = outcome.counts.rounded_away
        rounded = {"changed": outcome.counts.kept + lost, "rounded_away": lost} if lost else {}
        return where | outcome.row() | ties | remarks | rounded


def share_of(run: Run, options: FapmOptions) -> Fraction:
    """Return the share of entries that is kept, by the options or the default of the kind of FT."""
    is_adapter = run.checkpoints.tuned.kind == "adapter"
    return options.kept_share(ADAPTER_SPARSITY if is_adapter else DEFAULT_SPARSITY)


def kept_share(run: Run, options: FapmOptions) -> Fraction:
    """Return the share of entries that is kept, and say where FT does not bear as little; see share_of."""
    share = share_of(run, options)
    if run.checkpoints.tuned.kind == "adapter" and share < Fraction(1, 2):
        run.request.say(
            f"note: FT is an adapter; a low-rank delta does not bear {float(1 - share):.0%} sparsity "
            f"(default for adapters: {ADAPTER_SPARSITY:.0%})"
        )
    return share


def make_pruners(
    run: Run, options: FapmOptions, shares: Sequence[Fraction], *, write: bool, list_kept: bool = False
) -> list[Pruner]:
    """Return a pruner per share; where quotas are shared everything is read, to find their thresholds.

    Args:
        run: the pair.
        options: of the command.
        shares: of the entries of a quota that are kept.
        write: overwrite the base's entries with the result; False only counts.
        list_kept: give the places of kept entries.
    """
    shared, means = None, dict[str, float]()
    if options.selects and options.scope != "tensor":
        shared, means = survey(run, options, shares)
    pruning = Pruning(run.tensors.pool, options.seed, write=write, list_kept=list_kept)
    return [
        Pruner(
            run=run,
            options=options,
            pruning=pruning,
            share=share,
            shared=shared[at] if shared is not None else None,
            means=means,
        )
        for at, share in enumerate(shares)
    ]


def change_tensor(pruner: Pruner, name: str, density_map: DensityMap | None) -> Changed:
    """Return a tensor as the output should have it; its row is empty where it does not take part.

    Args:
        pruner: how.
        name: the tensor.
        density_map: gets a sample.

    Raises:
        CheckpointError: NaN or infinities that --nan does not allow.
    """
    run, options = pruner.run, pruner.options
    data = untouched(run.tensors, name, run.chosen, options)
    if data is not None:
        is_tuned = run.chosen.is_left_out(name) and options.rest == "tuned"
        return _list_changed(pruner, name, data) if is_tuned and pruner.pruning.list_kept else Changed(data, {})
    loaded = pruner.load(name)
    sample = _take_sample(pruner, name, loaded.pair) if density_map is not None else None  # before it is overwritten
    pair, outcome = pruner.prune(name, loaded.pair)
    refuse_bad_values(run.tensors, name, outcome.counts.nonfinite, options, pair.base)
    entries = None
    if outcome.indices is not None:
        kept = converted(pair.tuned[outcome.indices], pair.tuned_code, pair.base_code)
        entries = Entries(pair.base_code, pair.base.size, outcome.indices, kept)
    if density_map is not None and sample is not None:
        _add_to_map(density_map, pruner, name, sample, outcome.threshold)
    return Changed(pair.base, pruner.row(name, outcome, loaded.remarks), entries)


def _list_changed(pruner: Pruner, name: str, tuned: Stored) -> Changed:
    """A tensor that becomes FT's, with the entries in which it differs from BASE.

    ``tuned`` lies in the buffer that BASE is read into, so it is copied before BASE is read again.
    """
    info, bits, tuned = pruner.run.tensors.info(name), np.dtype(f"u{tuned.itemsize}"), tuned.copy()
    base = pruner.run.tensors.base(name)
    indices = np.flatnonzero(tuned.view(bits) != base.view(bits))
    base[:] = tuned
    return Changed(base, {}, Entries(info.dtype, info.numel, indices, tuned[indices]))


def recall_samples(pruner: Pruner, rows: Mapping[str, TensorRow], density_map: DensityMap) -> None:
    """Add to the figure what was pruned by the run that this one goes on with; before the rest, so in its order."""
    for name, row in rows.items():
        if row:
            sample = _take_sample(pruner, name, pruner.load(name).pair)
            _add_to_map(density_map, pruner, name, sample, row["threshold"])


def _take_sample(pruner: Pruner, name: str, pair: TensorPair) -> TensorPair:
    """Return copies of some entries of a tensor, spread evenly, for the figure."""
    return pair.take(sample_indices(pair.base.size, SAMPLE >> 1, 0, pruner.stream(name)))


def _add_to_map(
    density_map: DensityMap, pruner: Pruner, name: str, sample: TensorPair, threshold: float | None
) -> None:
    """Add a tensor to the figure's densities.

    Args:
        density_map: changed.
        pruner: gives the metric's scores.
        name: the tensor.
        sample: from take_sample.
        threshold: the lowest score that was kept; None if nothing was.
    """
    scores = None
    if pruner.options.selects:
        scores = block_scores(
            sample, Scratch(sample.base.size), pruner.options.seed, pruner.stream(name), SAMPLE_STREAM
        )
    density_map.add(sample, pruner.run.tensors.info(name).numel, threshold, scores)
