"""Points of a sweep: what ``fapm`` or ``merge`` would write at several strengths, to be read without writing it.

All points of a sweep read one pair of open checkpoints. What they have in common is done once: thresholds of shared
quotas are found at the start, for all strengths together.
"""

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fisherkit.floats import Stored
from fisherkit.kernels.nested import MOST
from fisherkit.methods.merge.fapm_prune import Pruner, change_tensor, make_pruners, share_of
from fisherkit.methods.merge.merge import inputs_of, merge_tensor
from fisherkit.methods.merge.merge_inputs import MergeInputs, open_inputs
from fisherkit.methods.merge.nested_points import NestedPoints
from fisherkit.methods.merge.output import fingerprint, provenance, write_config
from fisherkit.methods.merge.pair_run import Request, Run, all_of_tuned, open_run
from fisherkit.methods.merge.quotas import settle_ties
from fisherkit.methods.merge.regmean import Filters
from fisherkit.options import FapmOptions, MergeOptions, PairOptions
from fisherkit.pairs.outputs import Targets
from fisherkit.pairs.reader import is_floating
from fisherkit.pairs.virtual import VirtualCheckpoint
from fisherkit.progress import Say, Track


@dataclass(frozen=True)
class Points:
    """Points of a sweep, open.

    Attributes:
        run: the pair.
        folder: holds the config and the tokenizer that the command would write.
        tuned: FT as it is, in BASE's names and types.
        virtual: what would be written, in the order of the options.
        families: sets of points that remember in common, a byte per entry, what each keeps of a tensor.
    """

    run: Run
    folder: Path
    tuned: VirtualCheckpoint
    virtual: tuple[VirtualCheckpoint, ...]
    families: int = 0

    def remembered(self, layers: int) -> int:
        """Return the bytes that points remember in common when so many layers at a time are read, the next ones ahead.

        Args:
            layers: of a group.
        """
        sizes: dict[int, int] = defaultdict(int)
        for name in self.run.chosen.names:
            layer = self.run.chosen.places[name].layer
            if layer is not None:
                sizes[layer] += self.run.tensors.info(name).numel
        return 2 * layers * self.families * max(sizes.values(), default=0)


@contextmanager
def open_fapm_points(
    base: str | Path,
    tuned: str | Path,
    options: Sequence[FapmOptions],
    *,
    targets: Targets | None = None,
    room: int = 1 << 30,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> Iterator[Points]:
    """Open what ``fapm`` would write.

    Args:
        base: as for fapm.
        tuned: as for fapm.
        options: of each point; they may differ in ``sparsity`` or ``density``, ``metric`` and ``seed``.
        targets: where one of the points will be written; what fapm would refuse is refused now.
        room: bytes to remember in what points of one metric have in common; a byte per entry of the tensors that some
            points have read and others will.
        track: progress of what is read before the first point can be.
        say: gets remarks for people.

    Raises:
        CheckpointError, OptionError, OutputError: as for fapm.
    """
    with _open(Request("fapm", str(base), str(tuned), targets, options[0], None, track, say)) as (run, folder):
        pruners, nested = _pruners(run, options, room)
        virtual = [
            _virtual(
                run,
                partial(nested[at].read, pruner) if at in nested else partial(_pruned, pruner),
                {**_settings(run, own), "sparsity": str(1 - pruner.share)},
            )
            for at, (own, pruner) in enumerate(zip(options, pruners, strict=True))
        ]
        families = len(set(map(id, nested.values())))
        yield Points(run, folder, _tuned(run, options[0]), tuple(virtual), families)


@contextmanager
def open_merge_points(
    base: str | Path,
    tuned: str | Path,
    options: Sequence[MergeOptions],
    *,
    targets: Targets | None = None,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> Iterator[Points]:
    """Open what ``merge`` would write.

    Args:
        base: as for merge.
        tuned: as for merge.
        options: of each point; they may differ in everything but the fields of PairOptions.
        targets: where one of the points will be written; what merge would refuse is refused now.
        track: progress of what is read before the first point can be.
        say: gets remarks for people.

    Raises:
        CheckpointError, OptionError, OutputError: as for merge.
    """
    request = Request("merge", str(base), str(tuned), targets, options[0], None, track, say)
    files = list(dict.fromkeys(path for own in options for path in inputs_of(own)))
    with _open(request, files) as (run, folder), ExitStack() as stack:
        virtual, filters = [], Filters()
        silent = replace(run, request=replace(request, say=lambda line: None))
        for at, own in enumerate(options):
            inputs = stack.enter_context(
                open_inputs(silent if at else run, own, filters)
            )  # remarks are the same for all
            stamps = [f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in inputs_of(own)]
            virtual.append(
                _virtual(
                    run,
                    partial(_merged, run, own, inputs),
                    {
                        **_settings(run, own),
                        "inputs": stamps,
                        "also": inputs.solver.tunes.fingerprints if inputs.solver is not None else [],
                    },
                )
            )
        yield Points(run, folder, _tuned(run, options[0]), tuple(virtual))


@contextmanager
def _open(request: Request, inputs: Sequence[Path] = ()) -> Iterator[tuple[Run, Path]]:
    """Open the pair, and write what lies around the weights of the outputs into a folder of its own."""
    with open_run(request, inputs) as run, tempfile.TemporaryDirectory(prefix="fisherkit-") as folder:
        write_config(Path(folder), run)
        yield run, Path(folder)


def _pruners(run: Run, options: Sequence[FapmOptions], room: int) -> tuple[list[Pruner], dict[int, NestedPoints]]:
    """A pruner per point, and by number of the point what it shares with others of its metric and seed."""
    shares = [share_of(run, own) for own in options]
    pruners: dict[int, Pruner] = {}
    nested: dict[int, NestedPoints] = {}
    kinds = [(own.metric, own.seed) for own in options]
    for kind in dict.fromkeys(kinds):
        places = [at for at, other in enumerate(kinds) if other == kind]
        own = options[places[0]]
        made = make_pruners(run, own, [shares[at] for at in places], write=True)
        settle_ties(run, own, [pruner.shared for pruner in made if pruner.shared is not None], made[0].means)
        made = [replace(pruner, options=options[at]) for at, pruner in zip(places, made, strict=True)]
        pruners.update(zip(places, made, strict=True))
        if own.selects and 1 < len(places) <= MOST:
            nested.update(dict.fromkeys(places, NestedPoints(made, room // len(set(kinds)))))
    return [pruners[at] for at in range(len(options))], nested


def _pruned(pruner: Pruner, name: str) -> Stored:
    return change_tensor(pruner, name, None).data


def _merged(run: Run, options: MergeOptions, inputs: MergeInputs, name: str) -> Stored:
    return merge_tensor(run, options, inputs, name).data


def _tuned(run: Run, options: PairOptions) -> VirtualCheckpoint:
    """FT as it is where BASE has a place for it."""

    def compute(name: str) -> Stored | None:
        theirs = run.tensors.has_tuned(name) and is_floating(run.tensors.info(name))
        return all_of_tuned(run.tensors, name, options) if theirs else None

    return _virtual(run, compute, {"nan": options.nan})


def _virtual(run: Run, compute: Callable[[str], Stored | None], settings: Mapping[str, object]) -> VirtualCheckpoint:
    def marks() -> str:
        return hashlib.sha256(json.dumps(fingerprint(run.checkpoints, settings)).encode()).hexdigest()

    return VirtualCheckpoint(run.tensors, compute, marks)


def _settings(run: Run, options: PairOptions) -> dict[str, object]:
    """What makes another result of the same two checkpoints."""
    settings = provenance(replace(run.request, options=options), run.checkpoints)["options"]
    settings.pop("density", None)  # the sparsity says the same
    return {**settings, "names": run.chosen.names}
