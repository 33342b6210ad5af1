"""``extract``: the diagonal Fisher of a language model on a prompt set.

F_i = 1/N sum_n (d l_n / d theta_i)^2, l_n the negative log-likelihood of sample n over its loss tokens (arXiv
1612.00796; with the data's labels the empirical Fisher, arXiv 2502.11756). The square is per sample, never per batch.

A run has three parts: ``prepare`` decides everything, an engine fills files in the work folder, and ``publish`` renames
them once all of them, JSON included, are whole. Killed at any moment, ``--resume`` goes on to the same bits.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fisherkit.artefacts import covariance_file, fisher_sidecar
from fisherkit.artefacts.fisher_paths import FisherPaths
from fisherkit.checkpoint.atomic import publish, write_json
from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.hub import resolve_model
from fisherkit.checkpoint.target import check_target
from fisherkit.checkpoint.work_folder import Work, is_remains, read_progress
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.covariance.plan import covariance_bytes, left_out, probe_on_meta
from fisherkit.engine.covariance.writer import CovarianceWriter
from fisherkit.engine.fisher.sink import FisherSink, store_bytes, store_code
from fisherkit.engine.model.plan import Plan
from fisherkit.errors import FisherkitError, OutputError, ResumeError
from fisherkit.methods.extract.checks import check_apart
from fisherkit.methods.extract.engines import PROGRESS, run_engine
from fisherkit.methods.extract.prepare import Prepared, prepare
from fisherkit.methods.extract.provenance import digest, fingerprint, provenance
from fisherkit.options import ExtractOptions
from fisherkit.progress import Say, Track
from fisherkit.prompts.sources import PromptSource


@dataclasses.dataclass(frozen=True)
class ExtractReport:
    """Result of ``extract``.

    Attributes:
        path: the Fisher; its sidecar and layer importance lie beside it, and covariances if asked for.
        files: everything that was written.
        provenance: the sidecar without the statistics of tensors.
        layers: rows of ``layer_importance.json``.
    """

    path: Path
    files: tuple[Path, ...]
    provenance: dict[str, Any]
    layers: list[dict[str, Any]]


def extract(
    model: str | os.PathLike[str],
    prompts: PromptSource,
    out: str | os.PathLike[str],
    options: ExtractOptions | None = None,
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> ExtractReport:
    """Measure the diagonal Fisher of ``model`` on ``prompts`` and write it to ``out``.

    Args:
        model: a local checkpoint, or ``org/name[@revision]``.
        prompts: a file, folder or pattern, ``builtin``, ``-`` for stdin, a data set of the hub, or several of these.
        out: ``.pt``, ``.safetensors``, or a folder; bf16 (or fp32) tensors shaped like the weights, by their
            checkpoint names.
        options: what to measure and how.
        track: progress, called with stage, done and total.
        say: gets the lines meant for a person.

    Raises:
        FisherkitError: see ``fisherkit.errors``; nothing is at ``out`` then, and what was finished is kept in
            ``<out>.partial/`` for ``resume``.
    """
    options = options or ExtractOptions()
    paths = FisherPaths.of(Path(out))
    resolve_model(os.fspath(model), weights=False)  # a model that is not there is named before the output is refused
    left = read_progress(paths.partial, PROGRESS) if options.resume else None
    may_be_finished = options.resume and left is None and paths.fisher.exists()
    if not may_be_finished and not (left and "publishing" in left):
        _check_free(paths, options)
    prepared = prepare(os.fspath(model), prompts, options, say)
    assert prepared.prompts is not None
    check_apart(paths, prepared.source, prepared.skeleton, prompts)
    say(prepared.prompts.report.line())
    say(prepared.line())
    ours = fingerprint(prepared)
    if may_be_finished and _is_of(paths, digest(ours)):
        say(f"{paths.fisher}: is finished already")
        if is_remains(paths.partial):
            with Work.start(paths.partial, ours) as work:
                work.remove()
        return _report(paths, options)
    started = time.monotonic()
    with _open_work(paths.partial, ours, options, say) as work:
        try:
            if "publishing" not in work.progress:
                _check_free(paths, options)  # again: another run may have finished since
                _fill(paths, prepared, work, track, say, digest(ours), started)
            _publish(paths.fisher, options, work)
        except FisherkitError as error:
            if _is_refusal(error, work.progress):
                work.remove()
            raise
        work.remove()
    return _report(FisherPaths.of(paths.fisher), options)


def plan_extract(
    model: str | os.PathLike[str],
    prompts: PromptSource | None,
    options: ExtractOptions | None = None,
    *,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Say what ``extract`` would do; the model's config is enough, and nothing is computed or written.

    Args:
        model: as for extract.
        prompts: as for extract; None where there are none yet.
        options: what to measure and how.
        say: gets the lines meant for a person.

    Returns:
        Targets, parameters, bytes of the output, groups, peak memory by estimate, reads of the weights, and so on. What
        cannot be known without prompts or tokenizer is None.
    """
    options = options or ExtractOptions()
    prepared = prepare(os.fspath(model), prompts, options, say, dry_run=True)
    plan, need = prepared.plan, prepared.needs()
    samples = prepared.prompts.report if prepared.prompts is not None else None
    return {
        "model": prepared.source.id,
        "architecture": type(prepared.skeleton.model).__name__,
        "dtype": str(prepared.skeleton.dtype).removeprefix("torch."),
        "device": str(prepared.device),
        "layers": len(prepared.skeleton.blocks),
        "targets": len(plan.tensors),
        "parameters": plan.parameters,
        "output_bytes": plan.parameters * store_bytes(options.store),
        **_plan_covariances(prepared),
        "groups": len(plan.groups),
        "group_size": len(plan.groups[0]),
        "peak_bytes": {"host": need.host, "device": need.device},
        "weight_reads": 2,
        "samples": samples.samples if samples else None,
        "tokens": samples.tokens if samples else None,
    }


def _plan_covariances(prepared: Prepared) -> dict[str, Any]:
    """Return the bytes of the covariances; an upper bound where a model without weights does not run on meta."""
    if prepared.options.statistics != "activations":
        return {}
    shared_inputs = probe_on_meta(prepared.skeleton, prepared.plan)
    nbytes = sum(covariance_bytes(prepared.skeleton, prepared.plan, shared_inputs or {}).values())
    return {"activation_bytes": nbytes} | ({} if shared_inputs is not None else {"activation_bytes_at_most": True})


def _check_free(paths: FisherPaths, options: ExtractOptions) -> None:
    paths.check_free(covariances=options.statistics == "activations", force=options.force)


def _is_of(paths: FisherPaths, run: str) -> bool:
    """Return whether the output is whole and was made by a run of this fingerprint."""
    made = fisher_sidecar.owner(paths.sidecar, "run")
    return isinstance(made, dict) and made.get("fingerprint") == run and paths.importance.exists()


def _open_work(partial: Path, ours: Mapping[str, str], options: ExtractOptions, say: Say) -> Work:
    """Go on with a killed run, or start afresh, and say which."""
    if options.resume:
        work = Work.resume(partial, ours, PROGRESS)
        if work is not None:
            say(f"going on with what is finished in {partial}")
            return work
        say(f"nothing to resume in {partial}: starting from the beginning")
    elif partial.exists():
        say(f"{partial} is left over from an earlier run and is started over; --resume would go on with it")
    return Work.start(partial, ours)


def _is_refusal(error: FisherkitError, progress: Mapping[str, Any]) -> bool:
    """Return whether a run that failed would fail again, or has nothing to go on with: its work folder is dropped.

    Once a part of the Fisher is finished nothing is dropped: a file that could not be read may be there tomorrow.
    """
    if isinstance(error, OutputError):
        return "groups" not in progress  # refused before it began; a full disk can be emptied
    return "sink" not in progress and not isinstance(error, ResumeError)


def _fill(paths: FisherPaths, prepared: Prepared, work: Work, track: Track, say: Say, run: str, started: float) -> None:
    """Measure, and bring every file of the output into the staging folder."""
    groups = work.progress.get("groups")  # free memory may be another when a run goes on: its groups stay
    if groups is not None:
        if [block for group in groups for block in group] != list(range(len(prepared.skeleton.blocks))):
            raise _damaged(work)
        prepared = dataclasses.replace(prepared, plan=Plan(tuple(map(tuple, groups)), prepared.plan.targets))
    work.commit(groups=prepared.plan.groups)
    with _open_writer(paths, prepared, work) as writer, _open_covariances(paths, prepared, work) as covariances:
        sink = FisherSink(prepared.skeleton, writer, prepared.plan.tensors)
        if "sink" in work.progress:
            sink.restore(work.progress["sink"])
        run_engine(prepared, work, sink, covariances, track, say)
        if sink.figures.keys() != {tensor.name for tensor in prepared.plan.tensors}:
            raise _damaged(work)
        names = writer.seal()
    staged = paths.staged
    files = [staged.fisher / name for name in names] if paths.as_folder else [staged.fisher]
    made = provenance(prepared, work.progress["mode"]) | {
        "file": paths.fisher.name,
        "file_bytes": sum(file.stat().st_size for file in files if file.suffix != ".json"),
        "content_sha256": content_sha256(staged.fisher),
        "loss": work.progress.get("loss"),
    }
    made["run"] |= {"fingerprint": run, "seconds": round(time.monotonic() - started, 3)}
    if covariances is not None:
        _describe_covariances(paths, prepared, covariances, made, say)
    state = sink.state()
    details = {"tensors": fisher_sidecar.placed(state["tensors"]), "histogram": state["histogram"]}
    write_json(staged.sidecar, made | details)
    write_json(staged.importance, fisher_sidecar.layer_sums(prepared.source.id, paths.fisher, state["tensors"]))


def _damaged(work: Work) -> ResumeError:
    return ResumeError(f"{work.folder}: its progress does not add up; run again without --resume to start over")


def _open_writer(paths: FisherPaths, prepared: Prepared, work: Work) -> StreamedWriter:
    code, shard_bytes = store_code(prepared.options.store), prepared.options.shard_bytes
    specs = [TensorSpec(tensor.name, code, tensor.shape) for tensor in prepared.plan.tensors]
    open_writer = StreamedWriter.reopen if "laid_out" in work.progress else StreamedWriter.create
    writer = open_writer(paths.fisher, specs, work=work.staging, stem="fisher", shard_bytes=shard_bytes)
    work.commit(laid_out=True)
    return writer


def _open_covariances(
    paths: FisherPaths, prepared: Prepared, work: Work
) -> AbstractContextManager[CovarianceWriter | None]:
    """Open the file of covariances, where they are asked for; beside the staged Fisher until that is whole."""
    if prepared.options.statistics != "activations":
        return nullcontext()
    target = paths.fisher.with_name(paths.covariances.name)
    return CovarianceWriter(prepared.skeleton, prepared.plan, target, work.staging, prepared.device)


def _describe_covariances(
    paths: FisherPaths, prepared: Prepared, covariances: CovarianceWriter, made: Mapping[str, Any], say: Say
) -> None:
    """Write the JSON of the finished covariances into the staging folder."""
    without = left_out(prepared.plan, covariances.covariances)
    if without:
        say(f"activations: {len(without):,} matrices are no linear layer's and were left out, such as {without[0]}")
    staged = paths.staged.fisher.with_name(paths.covariances.name)
    about = covariance_file.description(staged, made, covariances.described(), without)
    write_json(paths.staged.covariances_json, about)


def _publish(fisher: Path, options: ExtractOptions, work: Work) -> None:
    """Rename what is staged; the Fisher comes last, and a folder as a whole. Goes on where a killed run stopped."""
    paths = FisherPaths.of(fisher)  # anew: another run may have written its layer_importance.json since
    staged = paths.staged
    if "publishing" not in work.progress:
        _check_free(paths, options)
        work.commit(publishing={"force": options.force})
    elif os.path.lexists(staged.fisher):
        check_target(paths.fisher, force=options.force or work.progress["publishing"]["force"])
    covariances = staged.fisher.with_name(paths.covariances.name)
    if paths.as_folder and covariances.exists():
        covariances.replace(staged.covariances)
    if not paths.as_folder:
        publish(list(zip(staged.described(), paths.described(), strict=True)))
    publish([(staged.fisher, paths.fisher)])


def _report(paths: FisherPaths, options: ExtractOptions) -> ExtractReport:
    """Read back what lies at the final names."""
    made = json.loads(paths.sidecar.read_bytes())
    layers = json.loads(paths.importance.read_bytes())["layers"]
    beside = [paths.sidecar, paths.importance]
    if options.statistics == "activations":
        beside += [paths.covariances, paths.covariances_json]
    tensors = sorted(set(paths.fisher.iterdir()) - set(beside)) if paths.as_folder else [paths.fisher]
    known = {key: value for key, value in made.items() if key not in ("tensors", "histogram")}
    return ExtractReport(paths.fisher, (*tensors, *beside), known, layers)
