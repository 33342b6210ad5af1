"""``extract``: the diagonal Fisher of a language model on a prompt set.

F_i = 1/N sum_n (d l_n / d theta_i)^2, l_n the negative log-likelihood of sample n over its loss tokens (arXiv
1612.00796; with the data's labels the empirical Fisher, arXiv 2502.11756). The square is per sample, never per batch.
"""

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import fisherkit
from fisherkit.checkpoint.hub import ModelSource, resolve_model
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.target import check_target, is_folder
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.blocks import Unreplayable
from fisherkit.engine.capture import NeedsSingles
from fisherkit.engine.job import Job, Track
from fisherkit.engine.memory import available_bytes
from fisherkit.engine.plan import HEADROOM, Plan, choose_targets, fit_groups, needs, only_batches_of_one
from fisherkit.engine.prompts import PromptSet, batches, load_prompts
from fisherkit.engine.resident import resident
from fisherkit.engine.sink import FisherSink, store_bytes, store_code
from fisherkit.engine.skeleton import (
    Skeleton,
    blocks_in_groups,
    build_skeleton,
    choose_dtype,
    first_line,
    read_config,
    shared_between_blocks,
)
from fisherkit.engine.sweep import stream
from fisherkit.engine.work import Budget, Work
from fisherkit.errors import CheckpointError, OptionError, OutputError, UnsupportedModelError
from fisherkit.methods import sidecar
from fisherkit.options import ExtractOptions

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ExtractReport:
    """What extract did.

    Attributes:
        path: the Fisher; its sidecar and layer importance lie beside it.
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
    check_target(out, force=options.force)
    run = _prepare(os.fspath(model), os.fspath(prompts), options, say)
    partial = out.with_name(out.name + ".partial")
    work = _open_work(partial, run.fingerprint(), options, say)
    started = time.monotonic()
    with _open_writer(out, run, work, options) as writer:
        sink = FisherSink(run.skeleton, writer, run.plan.tensors)
        if "sink" in work.progress:
            sink.restore(work.progress["sink"])
        engine, reason = _measure(run, work, sink, track, say)
        files = writer.finish(force=options.force)
    provenance = run.provenance(out, files, engine, reason) | {"loss": work.progress.get("loss")}
    provenance["run"]["seconds"] = round(time.monotonic() - started, 3)
    report = _write_sidecars(out, files, provenance, sink)
    work.remove()
    return report


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
        samples = _read_prompts(source, prompts, options).report if prompts is not None else None
    except CheckpointError:
        samples = None  # no tokenizer beside the config
    plan = _plan(skeleton, options, device, options.max_length, say)
    need = needs(
        skeleton, plan, batch_tokens=options.batch_tokens, longest=options.max_length, on_host=device.type == "cpu"
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
        "groups": len(plan.groups),
        "group_size": len(plan.groups[0]),
        "peak_bytes": {"host": need.host, "device": need.device},
        "weight_reads": 2,
        "samples": samples.samples if samples else None,
        "tokens": samples.tokens if samples else None,
    }


def choose_device(wanted: str) -> torch.device:
    """``auto`` is CUDA when there is one, else the CPU.

    Raises:
        OptionError: the device is not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {wanted}: not available here ({first_line(error)})") from error
    return device


@dataclasses.dataclass
class _Run:
    """Everything that is known before the first weight is read."""

    source: ModelSource
    skeleton: Skeleton
    tokenizer_sha256: str
    prompts: PromptSet
    plan: Plan
    device: torch.device
    options: ExtractOptions

    def fingerprint(self) -> dict[str, str]:
        """What must be the same for a killed run to go on, by what a person would call it."""
        options = dataclasses.asdict(self.options)
        for name in ("force", "resume", "trust_remote_code", "device", "engine", "limit"):
            options.pop(name)
        assert self.skeleton.index is not None
        return {
            "model": self.skeleton.index.fingerprint() + _hash(self.skeleton.model.config.to_json_string()),
            "prompts": self.prompts.report.sha256,
            "options": json.dumps(options | {"groups": self.plan.groups}, sort_keys=True),
            "device": self.device.type,
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        }

    def provenance(self, out: Path, files: Sequence[Path], engine: str, reason: str) -> dict[str, Any]:
        """Where the numbers come from; the sidecar without its statistics."""
        options, report = self.options, dataclasses.asdict(self.prompts.report)
        assert self.skeleton.index is not None
        return {
            "format": sidecar.FORMAT,
            "fisherkit": fisherkit.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "kind": "fisher",
            "file": out.name,
            "file_bytes": sum(file.stat().st_size for file in files if file.suffix != ".json"),
            "model": {
                "id": self.source.id,
                "revision": self.source.revision,
                "architecture": type(self.skeleton.model).__name__,
                "config_sha256": _hash(self.skeleton.model.config.to_json_string()),
                "weights_sha256": self.skeleton.index.fingerprint(),
                "dtype": str(choose_dtype(None, self.skeleton.index, "auto")).removeprefix("torch."),
                "tokenizer_sha256": self.tokenizer_sha256,
                "chat_template_sha256": report["template_sha256"],
            },
            "prompts": report,
            "estimator": {
                "name": "empirical" if options.labels == "data" else "sampled",
                "formula": "F_i = 1/N sum_n (d l_n / d theta_i)^2, l_n the negative log-likelihood of sample n",
                "labels": options.labels,
                "reduction": options.reduction,
                "targets": options.targets,
                "layers": list(options.layers) if options.layers is not None else None,
                "seed": options.seed,
            },
            "run": {
                "engine": engine,
                "reason": reason,
                "group_size": len(self.plan.groups[0]),
                "batch_tokens": options.batch_tokens,
                "dtype": str(self.skeleton.dtype).removeprefix("torch."),
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
                "accumulate": "float32",
                "store": options.store,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "blocks": self.skeleton.blocks_path,
            "layers": len(self.skeleton.blocks),
        }


def _prepare(model: str, prompts: str, options: ExtractOptions, say: Say) -> _Run:
    source = resolve_model(model)
    config = read_config(source.path, trust_remote_code=options.trust_remote_code)
    index = open_index(source.path)
    device = choose_device(options.device)
    dtype = choose_dtype(config, index, options.dtype)
    skeleton = build_skeleton(config, index, dtype, trust_remote_code=options.trust_remote_code)
    tokenizer = _tokenizer(source, options)
    samples = load_prompts(prompts, tokenizer, options)
    say(samples.report.line())
    longest = max(len(sample.ids) for sample in samples.samples)
    plan = _plan(skeleton, options, device, longest, say)
    say(
        f"{source.id}: {len(plan.tensors):,} tensors, {plan.parameters:,} weights in {len(skeleton.blocks)} layers, "
        f"{str(dtype).removeprefix('torch.')} on {device}, {len(plan.groups)} groups of {len(plan.groups[0])} layers"
    )
    return _Run(source, skeleton, _hash_tokenizer(tokenizer), samples, plan, device, options)


def _plan(skeleton: Skeleton, options: ExtractOptions, device: torch.device, longest: int, say: Say) -> Plan:
    """Targets and groups; a group size that would not fit the memory is lowered, and said."""
    targets = choose_targets(skeleton, options.targets, options.layers)
    wanted = Plan(blocks_in_groups(len(skeleton.blocks), options.group_size), targets)
    plan = fit_groups(
        skeleton,
        wanted,
        options.group_size,
        available_bytes(device),
        batch_tokens=options.batch_tokens,
        longest=longest,
        on_host=device.type == "cpu",
    )
    if len(plan.groups) != len(wanted.groups):
        say(f"group size lowered from {options.group_size} to {len(plan.groups[0])}: more would not fit the memory")
    return plan


def _read_prompts(source: ModelSource, prompts: str | os.PathLike[str], options: ExtractOptions) -> PromptSet:
    return load_prompts(os.fspath(prompts), _tokenizer(source, options), options)


def _tokenizer(source: ModelSource, options: ExtractOptions) -> Any:
    folder = source.path if source.path.is_dir() else source.path.parent
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=options.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: no tokenizer that transformers can load ({first_line(error)}); "
            "save it beside the model with tokenizer.save_pretrained(FOLDER)"
        ) from error


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


def _open_writer(out: Path, run: _Run, work: Work, options: ExtractOptions) -> AbstractContextManager[StreamedWriter]:
    code = store_code(options.store)
    specs = [TensorSpec(tensor.name, code, tensor.shape) for tensor in run.plan.tensors]
    open_writer = StreamedWriter.reopen if "laid_out" in work.progress else StreamedWriter.create
    writer = open_writer(out, specs, work=work.folder, stem="fisher", shard_bytes=options.shard_bytes)
    work.commit(laid_out=True)
    return writer


def _measure(run: _Run, work: Work, sink: FisherSink, track: Track, say: Say) -> tuple[str, str]:
    """Run the engine that fits this model; which it was, and why."""
    options, samples = run.options, run.prompts.samples
    singles = [(number,) for number in range(len(samples))]
    mode = work.progress.get("mode") or _first_mode(run)
    while True:
        work.commit(mode=mode)
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
            keep_weights=_weights_fit(run),
            general=frozenset(mode["general"]),
        )
        try:
            (resident if mode["engine"] == "resident" else stream)(job)
        except NeedsSingles as finding:
            mode = mode | {"singles": True, "general": sorted({*mode["general"], *finding.general})}
        except Unreplayable as finding:
            if options.engine == "stream":
                raise UnsupportedModelError(f"{run.source.id}: cannot be streamed: {finding}; try --engine auto") from None
            mode = {"engine": "resident", "reason": str(finding), "singles": True, "general": []}
            say(f"the whole model is kept in memory: {finding}")
        else:
            return mode["engine"], mode["reason"]
        for name in ("forward", "backward", "outer"):
            work.progress.pop(name, None)


def _first_mode(run: _Run) -> dict[str, Any]:
    shared = shared_between_blocks(run.skeleton.blocks)
    if run.options.engine == "resident":
        return {"engine": "resident", "reason": "asked for", "singles": True, "general": []}
    if shared is not None and run.options.engine == "auto":
        return {"engine": "resident", "reason": f"blocks share {shared}", "singles": True, "general": []}
    if shared is not None:
        raise UnsupportedModelError(f"{run.source.id}: cannot be streamed: blocks share {shared}; try --engine auto")
    singles = only_batches_of_one(run.skeleton, run.plan)
    return {"engine": "stream", "reason": "a replayed sample agrees with plain autograd", "singles": singles, "general": []}


def _weights_fit(run: _Run) -> bool:
    """Whether an accelerator can keep all weights between the two sweeps."""
    if run.device.type == "cpu":
        return False  # the page cache does it
    parameters = sum(p.numel() * p.element_size() for p in run.skeleton.model.parameters())
    need = needs(run.skeleton, run.plan, batch_tokens=run.options.batch_tokens, longest=run.options.max_length, on_host=False)
    return parameters + need.device <= HEADROOM * available_bytes(run.device)


def _write_sidecars(out: Path, files: tuple[Path, ...], provenance: dict[str, Any], sink: FisherSink) -> ExtractReport:
    importance = sidecar.importance(provenance["model"]["id"], out, sink.figures)
    details = {"tensors": sidecar.placed(sink.figures), "histogram": sink.histogram().to_json()}
    beside = (sidecar.sidecar_path(out), sidecar.importance_path(out))
    sidecar.write_json(beside[0], provenance | details)
    sidecar.write_json(beside[1], importance)
    return ExtractReport(out, (*files, *beside), provenance, importance["layers"])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _hash(backend.to_str())
    return _hash(json.dumps(sorted(tokenizer.get_vocab().items())))
