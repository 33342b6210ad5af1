"""``extract --dry-run``: what a run would measure, and what it would take, here or on another machine."""

import os
from collections.abc import Mapping
from typing import Any

from fisherkit.engine.covariance.plan import covariance_bytes, probe_on_meta
from fisherkit.engine.fisher.sink import store_bytes
from fisherkit.engine.model.plan import replays_of
from fisherkit.engine.model.workload import Workload, machine_rate, workload
from fisherkit.methods.extract.fit import form_of, misfit
from fisherkit.methods.extract.prepare import Prepared, prepare
from fisherkit.options import ExtractOptions
from fisherkit.options.checks import check_rate
from fisherkit.progress import Say
from fisherkit.prompts.sources import PromptSource


def plan_extract(
    model: str | os.PathLike[str],
    prompts: PromptSource | None,
    options: ExtractOptions | None = None,
    *,
    flops: float | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Say what ``extract`` would do; the model's config is enough, and nothing is computed or written.

    With ``memory`` or ``device_memory`` among the options the plan is for a machine that has these, not for this one.

    Args:
        model: as for extract.
        prompts: as for extract; None where there are none yet.
        options: what to measure and how.
        flops: operations per second of the machine; None for those of this one's CPU, which are measured.
        say: gets the lines meant for a person.

    Returns:
        Targets, parameters, bytes of the output, groups, peak memory by estimate, work and time, and so on. What cannot
        be known without prompts or tokenizer is None, and work is counted for ``limit`` samples of ``max_length`` then.
    """
    options = options or ExtractOptions()
    check_rate("flops", flops)
    prepared = prepare(os.fspath(model), prompts, options, say, dry_run=True)
    fit, plan = prepared.fit, prepared.plan
    need, made = fit.peak(), _plan_outputs(prepared)
    work = _workload(prepared, made)
    if not fit.holds:
        say(misfit(fit, prepared.skeleton, prepared.prompts, options, prepared.source.id))
    samples = prepared.prompts.report if prepared.prompts is not None else None
    rate = flops if flops is not None else _rate_here(prepared)
    gathered = options.statistics != "fisher"
    replays = max(len(replays_of(prepared.skeleton, plan, group, covariances=gathered)) for group in plan.groups)
    return {
        "model": prepared.source.id,
        "architecture": type(prepared.skeleton.model).__name__,
        "dtype": str(prepared.skeleton.dtype).removeprefix("torch."),
        "device": str(prepared.device),
        "layers": len(prepared.skeleton.blocks),
        "targets": len(plan.tensors),
        "parameters": plan.parameters,
        **made,
        "groups": len(plan.groups),
        "group_size": len(plan.groups[0]),
        "read_ahead": plan.read_ahead,
        "replays": replays,
        "peak_bytes": {"host": need.host, "device": need.device},
        "memory_bytes": {"host": fit.rooms.host, "device": fit.rooms.device},
        "fits": fit.holds,
        "weight_reads": 1 if options.statistics == "inputs" else 2,
        "samples": samples.samples if samples else None,
        "tokens": samples.tokens if samples else None,
        "flops": work.flops,
        "bytes_read": work.bytes_read,
        "bytes_written": work.bytes_written,
        "flops_per_second": None if rate is None else round(rate),
        "seconds": None if rate is None else round(work.flops / rate, 1),
    }


def _plan_outputs(prepared: Prepared) -> dict[str, Any]:
    """Return the bytes of Fisher and covariances; an upper bound where a model without weights does not run on meta."""
    options, plan = prepared.options, prepared.plan
    fisher = {"output_bytes": plan.parameters * store_bytes(options.store)}
    if options.statistics == "fisher":
        return fisher
    shared_inputs = probe_on_meta(prepared.skeleton, plan)
    nbytes = covariance_bytes(prepared.skeleton, plan, shared_inputs or {}, form_of(options))
    bound = {} if shared_inputs is not None else {"activation_bytes_at_most": True}
    return ({} if options.statistics == "inputs" else fisher) | {"activation_bytes": nbytes} | bound


def _workload(prepared: Prepared, made: Mapping[str, Any]) -> Workload:
    return workload(
        prepared.skeleton,
        prepared.plan,
        prepared.fit.estimate,
        output_bytes=made.get("output_bytes", 0) + made.get("activation_bytes", 0),
        spool_bytes=prepared.fit.spool_bytes,
    )


def _rate_here(prepared: Prepared) -> float | None:
    """Return the rate of this machine's CPU; None for an accelerator, which may be anywhere."""
    return machine_rate(prepared.skeleton.dtype) if prepared.device.type == "cpu" else None
