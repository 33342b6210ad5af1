"""FAPM: keep the part of a fine-tune that does not cost the base (arXiv 2509.08255), and the controls beside it.

Per tensor, in float32: d = W_ft - W, m = mean|W|, S = |d| (1 - m/|W|); the entries with the highest S are FT's, all
others BASE's, bit for bit. Nothing is rescaled. Unlike the authors' script, which adds bf16 differences and lets
undefined scores (0/0) win, entries that did not change and entries that are zero in the base score -inf, and the quota
is exact: ``floor((1 - sparsity) n)``, ties going to the lower index.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from fisherkit.errors import OptionError
from fisherkit.kernels.density import DensityMap
from fisherkit.methods.merge.fapm_prune import Pruner, change_tensor, kept_share, make_pruners, recall_samples
from fisherkit.methods.merge.fapm_report import FapmReport, facts, make_report, unfinished_report
from fisherkit.methods.merge.output import fingerprint, provenance, say_warnings, write_side_files
from fisherkit.methods.merge.pair_run import Request, Run, open_run
from fisherkit.methods.merge.quotas import settle_ties
from fisherkit.methods.merge.shares import check_share, write_share
from fisherkit.options import FapmOptions
from fisherkit.pairs.outputs import Targets, check_targets
from fisherkit.pairs.rewrite import Changed, rewriting
from fisherkit.progress import Say, Track


def fapm(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None,
    options: FapmOptions | None = None,
    *,
    sparse: str | Path | None = None,
    beside: Mapping[Path, Callable[[FapmReport], bytes]] | None = None,
    figure: bool = False,
    command: Sequence[str] | None = None,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> FapmReport:
    """Prune a fine-tuned delta and write a whole checkpoint, a sparse delta, or both.

    Args:
        base: the model that was fine-tuned: folder, file, ``org/name`` or ``org/name@revision``.
        tuned: the fine-tuned model, or a PEFT adapter's folder.
        out: folder to make; None writes no checkpoint.
        options: see FapmOptions.
        sparse: also write the kept entries alone (see artefacts.sparse_delta).
        beside: files to make of the report, such as itself as JSON; they appear together with the checkpoint.
        figure: gather what the figure needs.
        command: the command line, for the model card.
        track: progress, called with stage, done and total.
        say: gets remarks for people.

    Returns:
        The report; with nothing to write that is all that is made. Of a share (``options.shard``) while others are
        missing: ``missing`` names them, and only its own tensors are told of.

    Raises:
        CheckpointError: the two cannot be read, do not belong together, or are identical.
        OptionError: options that contradict each other.
        OutputError: the output exists, is one of the inputs, or cannot be written.
        ResumeError: the work folder belongs to another run.
    """
    options, beside = options or FapmOptions(), beside or {}
    out, sparse = (None if path is None else Path(path) for path in (out, sparse))
    if sparse is not None:
        check_sparse(sparse, options)
    if options.shard is not None:
        check_share(options, sparse=sparse is not None)
    is_written = out is not None or sparse is not None or bool(beside)
    targets = Targets(checkpoint=out, delta=sparse, beside=tuple(beside)) if is_written else None
    with open_run(Request("fapm", str(base), str(tuned), targets, options, command, track, say)) as run:
        share = kept_share(run, options)
        settings = {
            **provenance(run.request, run.checkpoints)["options"],
            "sparsity": str(1 - share),
            "names": run.chosen.names,
            "sparse": sparse is not None,
        }
        del settings["density"]  # says the same
        marks = fingerprint(run.checkpoints, settings)
        if targets is not None and options.shard is None:
            check_targets(targets, marks, force=options.force, resume=options.resume)  # before everything is read
        # Cached, and not made before it is needed: quotas that tensors share take a reading of everything.
        find_pruner = cache(
            lambda: make_pruners(run, options, [share], write=out is not None, list_kept=sparse is not None)[0]
        )
        density_map = DensityMap(options.metric) if figure else None
        if targets is None:
            report = _only_report(find_pruner(), density_map)
        elif options.shard is not None:
            report = _write_share(run, options, share, find_pruner, targets, marks, density_map, beside)
        else:
            report = _write(find_pruner(), targets, marks, density_map, beside)
        say_warnings(report.warnings, say)
        return report


def check_sparse(sparse: Path, options: FapmOptions) -> None:
    """Refuse a sparse delta that cannot be made.

    Args:
        sparse: its file.
        options: of fapm.

    Raises:
        OptionError: another suffix than ``.safetensors``, or a metric that does not select.
    """
    if not options.selects:
        raise OptionError(f"--sparse is for metrics that select; {options.metric} changes every entry")
    if sparse.suffix != ".safetensors":
        raise OptionError(f"--sparse {sparse}: a sparse delta ends in .safetensors")


def _only_report(pruner: Pruner, density_map: DensityMap | None) -> FapmReport:
    run, track = pruner.run, pruner.run.request.track
    rows, names = {}, run.chosen.names
    for at, name in enumerate(run.tensors.walk(names)):
        track("pruning", at, len(names))
        rows[name] = change_tensor(pruner, name, density_map).row
    track("pruning", len(names), len(names))
    return make_report(run, pruner.options, pruner.share, rows, density_map)


def _write(
    pruner: Pruner,
    targets: Targets,
    marks: Mapping[str, str],
    density_map: DensityMap | None,
    beside: Mapping[Path, Callable[[FapmReport], bytes]],
) -> FapmReport:
    run, options = pruner.run, pruner.options
    names = _names_to_change(pruner, targets)
    with rewriting(
        run.tensors,
        targets,
        names,
        fingerprint=marks,
        shard_bytes=options.shard_bytes,
        resume=options.resume,
        force=options.force,
    ) as rewrite:
        if pruner.shared is not None:
            pruner.shared.recall(rewrite.rows)
        if density_map is not None:
            # In the order of the rest: a run without a figure took small tensors first.
            done = {name: rewrite.rows[name] for name in names if name in rewrite.rows}
            recall_samples(pruner, done, density_map)
        in_order = pruner.shared is not None or density_map is not None or run.checkpoints.tuned.kind == "adapter"
        rewrite.write_all(
            names, lambda name: change_tensor(pruner, name, density_map), run.request.track, in_order=in_order
        )
        report = make_report(run, options, pruner.share, rewrite.rows, density_map)
        if rewrite.folder is not None:
            write_side_files(rewrite.folder, run, report.as_json(), facts(report.as_json()))
        report = replace(report, files=rewrite.seal(_about_delta(pruner, report)))
        rewrite.publish({path: make(report) for path, make in beside.items()})
    return report


def _write_share(
    run: Run,
    options: FapmOptions,
    kept: Fraction,
    find_pruner: Callable[[], Pruner],
    targets: Targets,
    marks: Mapping[str, str],
    density_map: DensityMap | None,
    beside: Mapping[Path, Callable[[FapmReport], bytes]],
) -> FapmReport:
    def start() -> Callable[[str], Changed]:
        pruner = find_pruner()
        if pruner.shared is not None:  # this share meets neither all tensors nor the first ones
            settle_ties(run, options, [pruner.shared], pruner.means)
        return lambda name: change_tensor(pruner, name, None)

    is_adapter = run.checkpoints.tuned.kind == "adapter"
    share = write_share(run, targets, options, marks, start, in_order=is_adapter)
    if not share.is_last:
        return unfinished_report(run, options, kept, share.rows, share.missing)
    return _write(replace(find_pruner(), options=replace(options, resume=True)), targets, marks, density_map, beside)


def _names_to_change(pruner: Pruner, targets: Targets) -> list[str]:
    """All tensors for a checkpoint; those that take part, and for a sparse delta those that become FT's, without."""
    chosen, every = pruner.run.chosen, list(pruner.run.checkpoints.base.index.tensors)
    if targets.checkpoint is not None:
        return every
    with_rest = targets.delta is not None and pruner.options.rest == "tuned"
    return [name for name in every if chosen.takes_part(name) or (with_rest and chosen.is_left_out(name))]


def _about_delta(pruner: Pruner, report: FapmReport) -> dict[str, Any]:
    return {
        "base": report.provenance["base"]["id"],
        "base_fingerprint": pruner.run.checkpoints.base.index.fingerprint(),
        "made": dict(report.provenance),
    }
