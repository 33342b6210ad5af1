"""merge: a fine-tuned delta put onto its base as far as a mask, a subspace, the layers' importance and a factor allow.

The four act in this order: ``mask`` (FT's entries only where it allows change), ``subspace`` (nothing of the delta in
protected directions; of a soft subspace, what a course of training under its pull would leave), ``layer_scale`` (the
more Fisher in a layer, the gentler), ``alpha``. None of them given, it is the interpolation ``(1 - alpha) base + alpha
FT`` of Wise-FT (arXiv 2109.01903). No mask is promised to protect. ``regmean`` solves for the delta instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fisherkit.artefacts.covariance_file import find_covariances
from fisherkit.checkpoint.folder.model_card import public_id
from fisherkit.errors import CheckpointError
from fisherkit.methods.merge.lora_output import lora_files
from fisherkit.methods.merge.merge_inputs import MergeInputs, open_inputs, read_treatment, unmasked
from fisherkit.methods.merge.output import (
    find_warnings,
    fingerprint,
    provenance,
    say_warnings,
    totals,
    write_side_files,
)
from fisherkit.methods.merge.pair_run import (
    Loaded,
    Request,
    Run,
    finished,
    load_pair,
    open_run,
    untouched,
)
from fisherkit.methods.merge.shares import check_share, write_share
from fisherkit.methods.merge.solved import open_lora, solve_line, solve_tensor, solve_totals, unsolved
from fisherkit.options import MergeOptions
from fisherkit.pairs.blend import blend
from fisherkit.pairs.outputs import Targets
from fisherkit.pairs.rewrite import Changed, TensorRow, rewriting
from fisherkit.progress import Say, Track


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Report of a merge.

    Attributes:
        path: the output.
        files: everything that was written.
        tensors: by BASE's names: ``layer``, ``module``, ``weights``, ``kept`` (entries that differ from BASE's),
            ``zero_deltas``, ``nonfinite``, ``scale``, ``energy`` (sum of d^2) and ``energy_kept`` (the share left), and
            ``unrelated`` where about half of the signs changed; where rounding to BASE's type takes changes away, how
            many entries had ``changed``, and how many of them were ``rounded_away``; ``regmean``: of a solve.
        totals: the same over all tensors that took part.
        rules: what happened to the tensors that did not.
        warnings: what a person should know.
        provenance: checkpoints, options, versions.
        missing: shares of the output that other processes have still to write; the output is not there before.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorRow]
    totals: Mapping[str, Any]
    rules: Mapping[str, Any]
    warnings: tuple[str, ...]
    provenance: Mapping[str, Any]
    missing: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what ``--report`` and ``--json`` write."""
        return {
            **self.provenance,
            "path": str(self.path),
            "files": [str(file) for file in self.files],
            "totals": dict(self.totals),
            "tensors": dict(self.tensors),
            "rules": dict(self.rules),
            "warnings": list(self.warnings),
            **({"missing": list(self.missing)} if self.missing else {}),
        }


def merge(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    beside: Mapping[Path, Callable[[MergeReport], bytes]] | None = None,
    command: Sequence[str] | None = None,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> MergeReport:
    """Write BASE with as much of FT's delta as the options allow.

    Args:
        base: the model that was fine-tuned: folder, file, ``org/name`` or ``org/name@revision``.
        tuned: the fine-tuned model, a PEFT adapter's folder, or a sparse delta that fapm wrote.
        out: folder to make.
        options: see MergeOptions.
        beside: files to make of the report, such as itself as JSON; they appear together with the checkpoint.
        command: the command line, for the model card.
        track: progress, called with stage, done and total.
        say: gets remarks for people.

    Raises:
        CheckpointError: the checkpoints, the mask or the subspace cannot be read or do not belong together.
        OptionError: options outside their range.
        OutputError: the output exists, is one of the inputs, or cannot be written.
        ResumeError: the work folder belongs to another run.
    """
    options, out, beside = options or MergeOptions(), Path(out), beside or {}
    if options.shard is not None:
        check_share(options)
    given = inputs_of(options)
    targets = Targets(checkpoint=out, beside=tuple(beside))
    request = Request("merge", str(base), str(tuned), targets, options, command, track, say)
    with open_run(request, given) as run, open_inputs(run, options) as inputs:
        _say_unmasked(run, options, unmasked(inputs, options, run.chosen))
        settings = {
            **provenance(request, run.checkpoints)["options"],
            "inputs": [f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in given],
            "also": inputs.solver.tunes.fingerprints if inputs.solver is not None else [],
            "names": run.chosen.names,
        }
        names, marks = list(run.checkpoints.base.index.tensors), fingerprint(run.checkpoints, settings)
        change = partial(merge_tensor, run, options, inputs)
        in_order = bool(inputs.subspaces) or inputs.solver is not None or run.checkpoints.tuned.kind == "adapter"
        if options.shard is not None:
            share = write_share(run, targets, options, marks, lambda: change, in_order=in_order)
            if not share.is_last:
                return replace(_report(run, options, out, inputs, share.rows), missing=share.missing)
            options = replace(options, resume=True)
        with rewriting(
            run.tensors,
            targets,
            names,
            fingerprint=marks,
            shard_bytes=options.shard_bytes,
            resume=options.resume,
            force=options.force,
        ) as rewrite:
            lora = open_lora(run, options, inputs.solver, rewrite)
            rewrite.write_all(names, change, track, in_order=in_order)
            report = _make_report(run, options, out, inputs, rewrite.rows)
            if lora is not None and rewrite.folder is not None:
                lora.finish(rewrite.folder, rewrite.rows, public_id(run.checkpoints.base_source))
            if rewrite.folder is not None:
                write_side_files(rewrite.folder, run, report.as_json(), _facts(report.as_json()))
            beside_weights = [out / name for name in lora_files(rewrite.folder or out)]
            report = replace(report, files=(*rewrite.seal({}), *beside_weights))
            rewrite.publish({path: make(report) for path, make in beside.items()})
        say_warnings(report.warnings, say)
        line = solve_line(report.totals)
        if line is not None:
            say(line)
        return report


def inputs_of(options: MergeOptions) -> list[Path]:
    """Return the files that are read besides the pair."""
    news = [new for _, new in options.also]
    named = [path for path in (*(options.regmean or options.fisher or ()), *news) if path is not None]
    solved = [find_covariances(path) for path in named] if options.regmean is not None else named
    return [path for path in (options.mask, options.subspace, options.layer_scale, *solved) if path is not None]


def _say_unmasked(run: Run, options: MergeOptions, names: Sequence[str]) -> None:
    if names and options.rest == "tuned":
        entries = sum(run.tensors.info(name).numel for name in names)
        run.request.say(
            f"note: {len(names)} tensors ({entries:,} entries, such as {names[0]!r}) are not in the mask and become "
            "FT's; --rest base keeps BASE's"
        )


def merge_tensor(run: Run, options: MergeOptions, inputs: MergeInputs, name: str) -> Changed:
    """Return a tensor as the output should have it; its row is empty where it does not take part.

    Args:
        run: the pair.
        options: of the command.
        inputs: the files that they name.
        name: the tensor.

    Raises:
        CheckpointError: NaN or infinities that --nan does not allow, or what a file holds does not fit the tensor.
    """
    data = untouched(run.tensors, name, run.chosen, options)
    if data is None and options.mask is not None and name not in inputs.masks and options.rest == "base":
        data = run.tensors.base(name)
    if data is not None:
        return Changed(data, {})
    if inputs.solver is not None:
        return solve_tensor(run, options, inputs.solver, name)
    shape = run.tensors.info(name).shape
    treatment = read_treatment(inputs, options, run.chosen, name, shape)
    pair, remarks = load_pair(run.tensors, name, options, selects=treatment.selects)
    counts = blend(pair, shape, treatment, run.tensors.pool)
    return finished(run, options, name, Loaded(pair, remarks), counts, treatment.scale)


def _make_report(
    run: Run, options: MergeOptions, out: Path, inputs: MergeInputs, all_rows: Mapping[str, TensorRow]
) -> MergeReport:
    """Make the report, but for the names of files.

    Raises:
        CheckpointError: nothing changed in any tensor that takes part.
    """
    rows = {name: row for name, row in all_rows.items() if row}
    if all(row["zero_deltas"] == row["weights"] for row in rows.values()):
        raise CheckpointError(
            f"{run.request.tuned}: is identical to BASE where it takes part; there is nothing to merge"
        )
    return _report(run, options, out, inputs, rows)


def _report(
    run: Run, options: MergeOptions, out: Path, inputs: MergeInputs, rows: Mapping[str, TensorRow]
) -> MergeReport:
    rows = {name: row for name, row in rows.items() if row}
    return MergeReport(
        path=out,
        files=(),
        tensors=rows,
        totals=totals(rows, ("weights", "kept", "zero_deltas", "nonfinite")) | solve_totals(rows),
        rules={
            **run.chosen.facts(options.rest),
            "not_in_mask": unmasked(inputs, options, run.chosen),
            "not_solved": unsolved(inputs.solver, run),
        },
        warnings=tuple(find_warnings(rows, run.tensors)),
        provenance=provenance(run.request, run.checkpoints),
    )


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the table in the model card; ``report`` is as_json's."""
    options, found = report["options"], report["totals"]
    given = {
        "mask": ("mask",),
        "subspace": ("subspace", "side"),
        "layer_scale": ("layer_scale", "power", "floor"),
        "regmean": ("regmean", "old_weight"),
        "fisher": ("fisher", "old_weight"),
    }
    keys = [key for option, own in given.items() if options[option] is not None for key in own]
    shown = {key.replace("_", " "): _words(options[key]) for key in (*keys, "alpha")}
    return shown | {
        "entries that differ from the base": f"{found['kept']:,} of {found['weights']:,} ({found['density']:.4%})",
        "share of the squared delta that is left": f"{found['energy_kept']:.4%}",
    }


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
