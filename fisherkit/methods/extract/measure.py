"""``extract``: the diagonal Fisher of a language model on a prompt set.

F_i = 1/N sum_n (d l_n / d theta_i)^2, l_n the negative log-likelihood of sample n over its loss tokens (arXiv
1612.00796; with the data's labels the empirical Fisher, arXiv 2502.11756). The square is per sample, never per batch.
"""

import dataclasses
import json
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fisherkit.artefacts import covariance_file, fisher_sidecar
from fisherkit.checkpoint.hub import resolve_model
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.target import check_target
from fisherkit.checkpoint.work_folder import PROGRESS, Work
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.covariance.plan import covariance_bytes, left_out, probe_on_meta
from fisherkit.engine.covariance.writer import CovarianceWriter
from fisherkit.engine.fisher.sink import FisherSink, store_bytes, store_code
from fisherkit.engine.model.config import choose_dtype, read_config
from fisherkit.engine.model.device import choose_device
from fisherkit.engine.model.findings import NeedsBatchSizeOne, Unreplayable
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.plan import Plan, needs, only_batches_of_one
from fisherkit.engine.model.skeleton import Skeleton, build_skeleton, shared_between_blocks
from fisherkit.engine.sweep.job import Job
from fisherkit.engine.sweep.resident import resident
from fisherkit.engine.sweep.spool import Budget
from fisherkit.engine.sweep.sweep import stream
from fisherkit.errors import CheckpointError, UnsupportedModelError
from fisherkit.methods.extract.prepare import Run, covariance_memory, load_tokenizer, make_plan, prepare
from fisherkit.options import ExtractOptions
from fisherkit.progress import Say, Track
from fisherkit.prompts.dataset import batches, load_prompts


@dataclasses.dataclass(frozen=True)
class ExtractReport:
    """What extract did.

    Attributes:
        path: the Fisher; its sidecar and layer importance lie beside it, and the moments of activations if asked for.
        files: everything that was written.
        provenance: what the sidecar says, statistics of the tensors left out.
        layers: rows of ``layer_importance.json``.
    """

    path: Path
    files: tuple[Path, ...]
    provenance: dict[str, Any]
    layers: list[dict[str, Any]]


def extract(
    model: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ExtractOptions | None = None,
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> ExtractReport:
    """Measure the diagonal Fisher of ``model`` on ``prompts`` and write it to ``out``.

    Args:
        model: a local checkpoint, or ``org/name[@revision]``.
        prompts: a file of prompts, ``builtin``, ``-`` for stdin, or a data set of the hub.
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
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    renamed = options.resume and _was_renamed(out, partial)
    if not renamed:
        check_target(out, force=options.force)
        fisher_sidecar.check_sidecar(out)
        if options.statistics == "activations":
            covariance_file.check_free(out, force=options.force)
    run = prepare(os.fspath(model), os.fspath(prompts), options, say)
    started = time.monotonic()
    with _open_work(partial, run.fingerprint(), options, say) as work:
        if not renamed:
            _fill(out, run, work, track, say)
        apart = covariance_file.path_beside(out)
        files = tuple(path for path in sorted(out.iterdir()) if path.stem != apart.stem) if out.is_dir() else (out,)
        provenance = run.provenance(out, files, work.progress["mode"]) | {"loss": work.progress.get("loss")}
        provenance["run"]["seconds"] = round(time.monotonic() - started, 3)
        more: list[Path] = []
        if "activations" in work.progress:
            more = covariance_file.put_in_place(out, work.folder, provenance, work.progress["activations"])
        report = _write_sidecars(out, files, provenance, work.progress["sink"])
        work.remove()
    return dataclasses.replace(report, files=(*report.files, *more))


def _fill(out: Path, run: Run, work: Work, track: Track, say: Say) -> None:
    """Measure, and put the finished file in its place; sidecars of an earlier file there are gone before that."""
    groups = work.progress.get("groups")  # free memory may be another when a run goes on: its groups stay
    if groups is not None:
        run.plan = Plan(tuple(map(tuple, groups)), run.plan.targets)
    work.commit(groups=run.plan.groups)
    with _open_writer(out, run, work, run.options) as writer, _open_moments(out, run, work) as moments:
        sink = FisherSink(run.skeleton, writer, run.plan.tensors)
        if "sink" in work.progress:
            sink.restore(work.progress["sink"])
        _measure(run, work, sink, moments, track, say)
        if moments is not None:
            _describe(moments, run, work, say)
            covariance_file.check_free(out, force=run.options.force)
        work.commit(renaming=True)
        check_target(out, force=run.options.force)
        fisher_sidecar.remove(out)
        writer.finish(force=run.options.force)


def _open_moments(out: Path, run: Run, work: Work) -> AbstractContextManager[CovarianceWriter | None]:
    """The file of moments in the work folder, where they are asked for; the Fisher's folder is not there yet."""
    if run.options.statistics != "activations":
        return nullcontext()
    target = out.with_name(covariance_file.path_beside(out).name)
    return CovarianceWriter(run.skeleton, run.plan, target, work.folder, run.device)


def _describe(moments: CovarianceWriter, run: Run, work: Work, say: Say) -> None:
    """Note what the JSON beside the moments will say."""
    without = left_out(run.plan, moments.moments)
    if without:
        say(f"activations: {len(without):,} matrices are no linear layer's and were left out, such as {without[0]}")
    work.commit(activations={"moments": moments.described(), "left_out": list(without)})


def _was_renamed(out: Path, partial: Path) -> bool:
    """Whether a run was killed after its finished file was put in place and before its sidecars were."""
    try:
        progress = json.loads((partial / PROGRESS).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return "renaming" in progress and out.exists() and not (partial / out.name).exists()


def plan_extract(
    model: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | None,
    options: ExtractOptions | None = None,
    *,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """What ``extract`` would do, from the model's config alone; nothing is computed or written.

    Prompts and weights are looked at if they are there: without them, their entries are None.

    Returns:
        Targets, parameters, bytes of the output, groups, peak memory by estimate, reads of the weights, and so on.
    """
    options = options or ExtractOptions()
    source = resolve_model(os.fspath(model), weights=False)
    config = read_config(source.path, trust_remote_code=options.trust_remote_code)
    try:
        index = open_index(source.path)
    except CheckpointError:
        index = None
    dtype = choose_dtype(config, index, options.dtype)
    skeleton = build_skeleton(config, index, dtype, trust_remote_code=options.trust_remote_code)
    device = choose_device(options.device)
    try:
        samples = (
            load_prompts(os.fspath(prompts), load_tokenizer(source, options), options).report
            if prompts is not None
            else None
        )
    except CheckpointError:
        samples = None  # no tokenizer beside the config
    plan = make_plan(skeleton, options, device, options.max_length, say)
    need = needs(
        skeleton,
        plan,
        batch_tokens=options.batch_tokens,
        longest=options.max_length,
        on_host=device.type == "cpu",
        moments=covariance_memory(skeleton, plan, options),
    )
    return {
        "model": source.id,
        "architecture": type(skeleton.model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "layers": len(skeleton.blocks),
        "targets": len(plan.tensors),
        "parameters": plan.parameters,
        "output_bytes": plan.parameters * store_bytes(options.store),
        **_plan_activations(skeleton, plan, options),
        "groups": len(plan.groups),
        "group_size": len(plan.groups[0]),
        "peak_bytes": {"host": need.host, "device": need.device},
        "weight_reads": 2,
        "samples": samples.samples if samples else None,
        "tokens": samples.tokens if samples else None,
    }


def _plan_activations(skeleton: Skeleton, plan: Plan, options: ExtractOptions) -> dict[str, Any]:
    """Bytes of the moments; an upper bound where the model does not run without weights, which tells who shares."""
    if options.statistics != "activations":
        return {}
    shared_inputs = probe_on_meta(skeleton, plan)
    return {"activation_bytes": sum(covariance_bytes(skeleton, plan, shared_inputs or {}).values())} | (
        {} if shared_inputs is not None else {"activation_bytes_at_most": True}
    )


def _open_work(partial: Path, fingerprint: dict[str, str], options: ExtractOptions, say: Say) -> Work:
    if options.resume:
        work = Work.resume(partial, fingerprint)
        if work is not None:
            say(f"going on with what is finished in {partial}")
            return work
        say(f"nothing to resume in {partial}: starting from the beginning")
    elif partial.exists():
        say(f"{partial} is left over from an earlier run and is started over; --resume would go on with it")
    return Work.start(partial, fingerprint)


def _open_writer(out: Path, run: Run, work: Work, options: ExtractOptions) -> AbstractContextManager[StreamedWriter]:
    code = store_code(options.store)
    specs = [TensorSpec(tensor.name, code, tensor.shape) for tensor in run.plan.tensors]
    open_writer = StreamedWriter.reopen if "laid_out" in work.progress else StreamedWriter.create
    writer = open_writer(out, specs, work=work.folder, stem="fisher", shard_bytes=options.shard_bytes)
    work.commit(laid_out=True)
    return writer


def _measure(run: Run, work: Work, sink: FisherSink, moments: CovarianceWriter | None, track: Track, say: Say) -> None:
    """Run the engine that fits this model; the work folder notes which it was, and why."""
    options, samples = run.options, run.prompts.samples
    singles = [(number,) for number in range(len(samples))]
    mode = work.progress.get("mode") or _first_mode(run)
    while True:
        work.commit(mode=mode)
        if moments is not None:
            moments.begin(frozenset(mode["general"]), work.progress)
        job = Job(
            skeleton=run.skeleton,
            plan=run.plan,
            samples=samples,
            batches=singles if mode["singles"] else batches(samples, options.batch_tokens),
            device=run.device,
            work=work,
            sink=sink,
            budget=Budget(available_bytes(torch.device("cpu")) // 8),
            track=track,
            reduction=options.reduction,
            labels=options.labels,
            seed=options.seed,
            keep_weights=run.weights_fit(),
            general=frozenset(mode["general"]),
            moments=moments,
        )
        try:
            (resident if mode["engine"] == "resident" else stream)(job)
        except NeedsBatchSizeOne as finding:
            mode = mode | {"singles": True, "general": sorted({*mode["general"], *finding.general})}
        except Unreplayable as finding:
            mode = _resident_mode(run, str(finding))
            say(f"the whole model is kept in memory: {finding}")
        else:
            return
        sink.reset()
        for name in ("forward", "backward", "outer", "sink", "loss", "heard", "moments"):
            work.progress.pop(name, None)


def _first_mode(run: Run) -> dict[str, Any]:
    if run.options.engine == "resident":
        return {"engine": "resident", "reason": "asked for", "singles": True, "general": []}
    shared = shared_between_blocks(run.skeleton.blocks)
    if shared is not None:
        return _resident_mode(run, f"its blocks share {shared}")
    singles = only_batches_of_one(run.skeleton, run.plan)
    reason = "a replayed sample agrees with plain autograd"
    return {"engine": "stream", "reason": reason, "singles": singles, "general": []}


def _resident_mode(run: Run, reason: str) -> dict[str, Any]:
    """The mode for a model that cannot be streamed; raises UnsupportedModelError where it is not possible either."""
    if run.options.engine == "stream":
        raise UnsupportedModelError(f"{run.source.id}: cannot be streamed: {reason}; try --engine auto")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in run.skeleton.model.parameters())
    room = available_bytes(run.device)
    if weights > room:
        raise UnsupportedModelError(
            f"{run.source.id}: cannot be streamed ({reason}), and its {weights / 1e9:.1f} GB do not fit the "
            f"{room / 1e9:.1f} GB of memory"
        )
    return {"engine": "resident", "reason": reason, "singles": True, "general": []}


def _write_sidecars(
    out: Path, files: tuple[Path, ...], provenance: dict[str, Any], state: dict[str, Any]
) -> ExtractReport:
    importance = fisher_sidecar.importance(provenance["model"]["id"], out, state["tensors"])
    details = {"tensors": fisher_sidecar.placed(state["tensors"]), "histogram": state["histogram"]}
    beside = (fisher_sidecar.sidecar_path(out), fisher_sidecar.importance_path(out))
    fisher_sidecar.write_json(beside[0], provenance | details)
    fisher_sidecar.write_json(beside[1], importance)
    return ExtractReport(out, (*files, *beside), provenance, importance["layers"])
