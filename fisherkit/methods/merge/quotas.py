"""How many entries a tensor may keep: a quota of its own, or its part of one that several tensors share."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from fisherkit.kernels.prune import TensorPair
from fisherkit.kernels.top_k import Threshold, quota
from fisherkit.methods.merge.pair_run import Run
from fisherkit.options import FapmOptions
from fisherkit.pairs.prune import Outcome, Pruning, stream_of
from fisherkit.pairs.rewrite import Row
from fisherkit.pairs.thresholds import Stream, find_cuts


class Quotas:
    """The quotas of one run. With a shared one, tensors must come in the order of the checkpoint.

    Attributes:
        means: mean magnitude of each tensor, where a survey has found it already.
    """

    def __init__(self, run: Run, options: FapmOptions) -> None:
        self.means: dict[str, float] = {}
        self._run = run
        self._options = options
        self._cuts: dict[str, list[Threshold]] = {}
        self._spent: dict[str, int] = defaultdict(int)
        self._ties_of: dict[str, int] = {}

    def group_sizes(self) -> dict[str, int]:
        """Entries by group; a group is a tensor, a layer or everything."""
        sizes: dict[str, int] = defaultdict(int)
        for name in self._run.chosen.names:
            group = name if self._options.scope == "tensor" else self._group(name)
            sizes[group] += self._run.tensors.info(name).numel
        return sizes

    def survey(self, shares: Sequence[Fraction]) -> None:
        """Find the thresholds of shared quotas, one per share; nothing to do where every tensor has its own."""
        if self._options.scope == "tensor" or not self._options.selects:
            return
        names = self._run.chosen.names
        stream = Stream(
            names=names,
            group={name: self._group(name) for name in names},
            load=lambda name, mean: self._run.sides(name, self._options.metric, mean, selects=True),
            stream={name: random_stream(self._run, name) for name in names},
            seed=self._options.seed,
        )
        quotas = {group: [quota(share, size) for share in shares] for group, size in self.group_sizes().items()}
        self._cuts, self.means = find_cuts(self._run.tensors, stream, quotas, self._run.request.track)

    def prune(
        self, pruning: Pruning, name: str, load: Callable[[], TensorPair], share: Fraction, number: int
    ) -> tuple[TensorPair, Outcome]:
        """Prune a tensor by the quota that is its own, or by the threshold of the ``number``-th share surveyed."""
        if self._options.scope != "tensor":
            return self._by_shared_cut(pruning, name, load(), number)
        kept = quota(share, self._run.tensors.info(name).numel)
        return pruning.by_quota(load, kept, random_stream(self._run, name))

    def recall(self, rows: Mapping[str, Row]) -> None:
        """Take from the quotas what tensors have kept in the run that this one goes on with."""
        for name, row in rows.items():
            self._count_ties(name, 0, row.get("ties", 0))

    def _group(self, name: str) -> str:
        return self._run.chosen.places[name].layer_name if self._options.scope == "layer" else ""

    def _by_shared_cut(self, pruning: Pruning, name: str, sides: TensorPair, number: int) -> tuple[TensorPair, Outcome]:
        """Entries at the threshold itself are kept in the order of tensors, as long as the quota lasts.

        Two tensors that both sides tie stay equal: the second keeps what the first did.
        """
        group, twin = f"{number} {self._group(name)}", f"{number} {self._twin(name)}"
        cut = self._cuts[self._group(name)][number]
        left = self._ties_of.get(twin, cut.ties - self._spent[group])
        sides, outcome = pruning.by_threshold(sides, Threshold(cut.at, left), random_stream(self._run, name))
        self._count_ties(name, number, outcome.ties)
        return sides, outcome

    def _count_ties(self, name: str, number: int, ties: int) -> None:
        if f"{number} {self._twin(name)}" not in self._ties_of:
            self._spent[f"{number} {self._group(name)}"] += ties
        self._ties_of[f"{number} {name}"] = ties

    def _twin(self, name: str) -> str | None:
        """The tensor that both sides tie this one to."""
        tied_pairs = self._run.pair.tuned.tied_pairs
        return tied_pairs.get(name) or next((head for head, body in tied_pairs.items() if body == name), None)


def random_stream(run: Run, name: str) -> int:
    """The random stream of a tensor; that of its twin where both sides tie the two."""
    return stream_of(run.pair.tuned.tied_pairs.get(name, name))
