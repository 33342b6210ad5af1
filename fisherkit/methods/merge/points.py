"""Points of a sweep: what ``fapm`` or ``merge`` would write at several strengths, to be read without writing it.

All points of a sweep read one pair of open checkpoints. What they have in common is done once: thresholds of shared
quotas are found at the start, for all strengths together.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fisherkit.floats import Stored
from fisherkit.methods.merge.fapm_prune import Pruner, change_tensor, kept_share, make_pruners
from fisherkit.methods.merge.merge import inputs_of, merge_tensor
from fisherkit.methods.merge.merge_inputs import MergeInputs, open_inputs
from fisherkit.methods.merge.output import fingerprint, provenance, write_config
from fisherkit.methods.merge.pair_run import Request, Run, all_of_tuned, open_run
from fisherkit.methods.merge.quotas import settle_ties
from fisherkit.options import FapmOptions, MergeOptions, PairOptions
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
    """

    run: Run
    folder: Path
    tuned: VirtualCheckpoint
    virtual: tuple[VirtualCheckpoint, ...]


@contextmanager
def open_fapm_points(
    base: str | Path,
    tuned: str | Path,
    options: Sequence[FapmOptions],
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> Iterator[Points]:
    """Open what ``fapm`` would write.

    Args:
        base: as for fapm.
        tuned: as for fapm.
        options: of each point; they may differ in ``sparsity`` or ``density``, ``metric`` and ``seed``.
        track: progress of what is read before the first point can be.
        say: gets remarks for people.

    Raises:
        CheckpointError, OptionError: as for fapm.
    """
    with _open(Request("fapm", str(base), str(tuned), None, options[0], None, track, say)) as (run, folder):
        pruners = _pruners(run, options)
        virtual = [
            _virtual(
                run,
                partial(_pruned, pruner),
                {**_settings(run, own), "sparsity": str(1 - pruner.share)},
            )
            for own, pruner in zip(options, pruners, strict=True)
        ]
        yield Points(run, folder, _tuned(run, options[0]), tuple(virtual))


@contextmanager
def open_merge_points(
    base: str | Path,
    tuned: str | Path,
    options: Sequence[MergeOptions],
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> Iterator[Points]:
    """Open what ``merge`` would write.

    Args:
        base: as for merge.
        tuned: as for merge.
        options: of each point; they may differ in everything but the fields of PairOptions.
        track: progress of what is read before the first point can be.
        say: gets remarks for people.

    Raises:
        CheckpointError, OptionError: as for merge.
    """
    request = Request("merge", str(base), str(tuned), None, options[0], None, track, say)
    with _open(request) as (run, folder), ExitStack() as stack:
        virtual = []
        for own in options:
            inputs = stack.enter_context(open_inputs(run, own))
            files = [f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in inputs_of(own)]
            virtual.append(
                _virtual(
                    run,
                    partial(_merged, run, own, inputs),
                    {**_settings(run, own), "inputs": files},
                )
            )
        yield Points(run, folder, _tuned(run, options[0]), tuple(virtual))


@contextmanager
def _open(request: Request) -> Iterator[tuple[Run, Path]]:
    """Open the pair, and write what lies around the weights of the outputs into a folder of its own."""
    with open_run(request) as run, tempfile.TemporaryDirectory(prefix="fisherkit-") as folder:
        write_config(Path(folder), run)
        yield run, Path(folder)


def _pruners(run: Run, options: Sequence[FapmOptions]) -> list[Pruner]:
    """A pruner per point; the points of one metric and seed look for their thresholds together."""
    shares = [kept_share(run, own) for own in options]
    pruners: dict[int, Pruner] = {}
    kinds = [(own.metric, own.seed) for own in options]
    for kind in dict.fromkeys(kinds):
        places = [at for at, other in enumerate(kinds) if other == kind]
        own = options[places[0]]
        made = make_pruners(run, own, [shares[at] for at in places], write=True)
        settle_ties(run, own, [pruner.shared for pruner in made if pruner.shared is not None], made[0].means)
        pruners.update(zip(places, made, strict=True))
    return [replace(pruners[at], options=own) for at, own in enumerate(options)]


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
