"""FAPM: keep the part of a fine-tune that does not cost the base (arXiv 2509.08255), and the controls beside it.

Per tensor, in float32: d = W_ft - W, m = mean|W|, S = |d| (1 - m/|W|); the entries with the highest S are FT's, all
others BASE's, bit for bit. Nothing is rescaled. Unlike the authors' script, which adds bf16 differences and lets
undefined scores (0/0) win, entries that did not change and entries that are zero in the base score -inf, and the quota
is exact: ``floor((1 - sparsity) n)``, ties going to the lower index.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fisherkit.artefacts.sparse_delta import SparseWriter, check_sidecar, sidecar_of
from fisherkit.checkpoint.target import check_apart, check_target
from fisherkit.checkpoint.work_folder import Work
from fisherkit.errors import OptionError
from fisherkit.kernels.density import DensityMap
from fisherkit.methods.merge.fapm_prune import Pruner, change_tensor, kept_share, make_pruners, recall_samples
from fisherkit.methods.merge.fapm_report import FapmReport, facts, make_report
from fisherkit.methods.merge.output import fingerprint, provenance, say_warnings, write_side_files
from fisherkit.methods.merge.pair_run import Request, open_run
from fisherkit.options import FapmOptions
from fisherkit.pairs.rewrite import Row, rewriting, work_folder
from fisherkit.progress import Say, Track


def fapm(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None,
    options: FapmOptions | None = None,
    *,
    sparse: str | Path | None = None,
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
        figure: gather what the figure needs.
        command: the command line, for the model card.
        track: progress, called with stage, done and total.
        say: gets remarks for people.

    Raises:
        CheckpointError: the two cannot be read, do not belong together, or are identical.
        OptionError: options that contradict each other.
        OutputError: the output exists, is one of the inputs, or cannot be written.
        ResumeError: the work folder belongs to another run.
    """
    options = options or FapmOptions()
    target = Path(out) if out is not None else None
    sparse = Path(sparse) if sparse is not None else None
    if sparse is not None:
        if options.resume:
            say("note: a sparse delta is not gone on with; starting over")
            options = replace(options, resume=False, force=options.force or work_folder(sparse).is_dir())
        _check_sparse(sparse, options)
        check_apart((sparse, sidecar_of(sparse)), (Path(base), Path(tuned)), target)
    with open_run(Request("fapm", str(base), str(tuned), target, options, command, track, say)) as run:
        share = kept_share(run, options)
        pruner = make_pruners(run, options, [share], write=target is not None, list_kept=sparse is not None)[0]
        density_map = DensityMap(options.metric) if figure else None
        if sparse is None:
            return _prune_all(pruner, None, density_map)
        return _prune_with_delta(pruner, sparse, density_map)


def _check_sparse(sparse: Path, options: FapmOptions) -> None:
    if not options.selects:
        raise OptionError(f"--sparse is for metrics that select; {options.metric} changes every entry")
    if sparse.suffix != ".safetensors":
        raise OptionError(f"--sparse {sparse}: a sparse delta ends in .safetensors")
    check_target(sparse, force=options.force)
    check_sidecar(sparse)


def _prune_with_delta(pruner: Pruner, sparse: Path, density_map: DensityMap | None) -> FapmReport:
    """Prune, and write the kept entries alone; what was gathered of them is no use to a later run."""
    with Work.start(work_folder(sparse), {"sparse": sparse.name}) as held:
        try:
            with contextlib.closing(SparseWriter(held.folder)) as writer:
                report = _prune_all(pruner, writer, density_map)
                about = {
                    "base": report.provenance["base"]["id"],
                    "base_fingerprint": pruner.run.checkpoints.base.index.fingerprint(),
                }
                writer.finish(sparse, about | {"made": dict(report.provenance)}, force=pruner.options.force)
        except Exception:
            held.remove()
            raise
        held.remove()
    return replace(report, files=(*report.files, sparse, sidecar_of(sparse)))


def _prune_all(pruner: Pruner, delta: SparseWriter | None, density_map: DensityMap | None) -> FapmReport:
    """Prune every tensor; write a checkpoint if one is wanted."""
    report = (
        _only_report(pruner, delta, density_map)
        if pruner.run.request.out is None
        else _write(pruner, pruner.run.request.out, delta, density_map)
    )
    say_warnings(report.warnings, pruner.run.request.say)
    return report


def _only_report(pruner: Pruner, delta: SparseWriter | None, density_map: DensityMap | None) -> FapmReport:
    rows: dict[str, Row] = {}
    names, track = _listed(pruner, with_rest=delta is not None), pruner.run.request.track
    for at, name in enumerate(pruner.run.tensors.walk(names)):
        track("pruning", at, len(names))
        rows[name] = change_tensor(pruner, name, delta, density_map)[1]
    track("pruning", len(names), len(names))
    return make_report(pruner.run, pruner.options, pruner.share, rows, density_map)


def _listed(pruner: Pruner, *, with_rest: bool) -> list[str]:
    """Tensors to look at where no checkpoint is written: a sparse delta also has those that become FT's as a whole."""
    chosen = pruner.run.chosen
    listed = {*chosen.names, *(chosen.rest if with_rest and pruner.options.rest == "tuned" else ())}
    return [name for name in pruner.run.checkpoints.base.index.tensors if name in listed]


def _write(pruner: Pruner, out: Path, delta: SparseWriter | None, density_map: DensityMap | None) -> FapmReport:
    run, options = pruner.run, pruner.options
    settings = {
        **provenance(run.request, run.checkpoints)["options"],
        "sparsity": str(1 - pruner.share),
        "names": run.chosen.names,
    }
    del settings["density"]  # says the same
    with rewriting(
        run.tensors,
        out,
        fingerprint=fingerprint(run.checkpoints, settings),
        shard_bytes=options.shard_bytes,
        resume=options.resume,
        force=options.force,
    ) as rewrite:
        if pruner.shared is not None:
            pruner.shared.recall(rewrite.rows)
        if density_map is not None:
            recall_samples(pruner, rewrite.rows, density_map)
        rewrite.write_all(lambda name: change_tensor(pruner, name, delta, density_map), run.request.track)
        report = make_report(run, options, pruner.share, rewrite.rows, density_map)
        if rewrite.folder is not None:
            write_side_files(rewrite.folder, run, report.as_json(), facts(report.as_json()))
        return replace(report, files=rewrite.publish())
