"""Choice of the engine: block by block, or, where blocks cannot be replayed, with the whole model in memory."""

from typing import Any

from fisherkit.artefacts import fisher_sidecar
from fisherkit.checkpoint.schema import flag, listed, maybe, named, number, table, text, whole
from fisherkit.checkpoint.work_folder import Work
from fisherkit.engine.covariance.writer import CovarianceWriter
from fisherkit.engine.fisher.sink import FisherSink, NoSink
from fisherkit.engine.model.findings import AttendsAhead, NeedsBatchSizeOne, Unreplayable
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.plan import only_batches_of_one, replays_of
from fisherkit.engine.model.residence import check_resident, leaks, takes_token_types, why_resident
from fisherkit.engine.sweep.inputs import resident_inputs, stream_inputs
from fisherkit.engine.sweep.job import Job
from fisherkit.engine.sweep.resident import resident
from fisherkit.engine.sweep.spool import Budget
from fisherkit.engine.sweep.sweep import stream
from fisherkit.methods.extract.prepare import Prepared
from fisherkit.methods.extract.whole_run import whole_run
from fisherkit.progress import Say, Track
from fisherkit.prompts.dataset import batches

Mode = dict[str, Any]
"""How a run goes: ``engine``, the ``reason``, ``singles`` (batches of one sample), ``general`` (left to autograd),
``token_types`` (they tell prefix from answer)."""

PROGRESS = table(
    {},
    {
        "groups": listed(listed(whole(), 1), 1),
        "batch_tokens": whole(1),
        "mode": table(
            {"engine": text("stream", "resident"), "reason": text(), "singles": flag, "general": listed(text())}
        ),
        "laid_out": flag,
        **dict.fromkeys(("forward", "backward", "resident"), whole()),
        "loss": number(),
        "heard": named(text()),
        "moments": table({}, {"heard": named(text()), "figures": named(named(maybe(number())))}),
        "sink": table({"tensors": named(fisher_sidecar.FIGURES), "histogram": fisher_sidecar.HISTOGRAM}),
        "publishing": table({"force": flag}),
        "run": text(),
    },
)
"""What the work folder of a run may say; see checkpoint.schema."""
_ENGINES = {
    ("stream", False): stream,
    ("resident", False): resident,
    ("stream", True): stream_inputs,
    ("resident", True): resident_inputs,
}
"""By the mode's engine, and whether inputs alone are measured."""
_STARTED_OVER = ("forward", "backward", "outer", "sink", "loss", "heard", "moments")
"""What the work folder forgets when another mode starts over."""


def run_engine(
    prepared: Prepared,
    work: Work,
    sink: FisherSink | NoSink,
    covariances: CovarianceWriter | None,
    track: Track,
    say: Say,
) -> None:
    """Measure; the work folder notes under ``mode`` which engine it was, and why.

    An engine that finds that its way is wrong for this model says so by an exception, and the next one starts over.

    Raises:
        FisherkitError: a loss or a value that is not finite, or a model that fits neither engine.
    """
    mode = work.progress.get("mode") or _first_mode(prepared, say)
    while True:
        work.commit(mode=mode)
        if covariances is not None:
            covariances.begin(frozenset(mode["general"]), work.progress)
        job = _job(prepared, work, sink, covariances, mode, track)
        try:
            _ENGINES[mode["engine"], prepared.options.statistics == "inputs"](job)
        except AttendsAhead:
            if mode.get("token_types") or not takes_token_types(prepared.skeleton):
                raise leaks(prepared.source.id, prepared.skeleton) from None
            mode = mode | {"token_types": True}
        except NeedsBatchSizeOne as finding:
            mode = mode | {"singles": True, "general": sorted({*mode["general"], *finding.general})}
        except Unreplayable as finding:
            mode = mode | _resident_mode(prepared, str(finding), say)
        else:
            return
        sink.reset()
        for name in _STARTED_OVER:
            work.progress.pop(name, None)


def _job(
    prepared: Prepared,
    work: Work,
    sink: FisherSink | NoSink,
    covariances: CovarianceWriter | None,
    mode: Mode,
    track: Track,
) -> Job:
    assert prepared.prompts is not None
    options, samples, ranks = prepared.options, prepared.prompts.samples, prepared.ranks
    own = ranks.own_samples([len(sample.ids) for sample in samples])
    packed = batches([samples[number] for number in own], options.tokens_per_batch)
    sizes = [(n,) for n in own] if mode["singles"] else [tuple(own[place] for place in batch) for batch in packed]
    replays = [
        len(replays_of(prepared.skeleton, prepared.plan, group, covariances=covariances is not None))
        for group in prepared.plan.groups
    ]
    progress = whole_run(
        prepared.plan,
        mode["engine"],
        inputs_only=prepared.options.statistics == "inputs",
        replays=replays,
        samples=len(samples),
        batches=len(sizes),
        device=prepared.device,
        track=ranks.track(track),
    )
    return Job(
        skeleton=prepared.skeleton,
        plan=prepared.plan,
        samples=samples,
        batches=sizes,
        device=prepared.device,
        work=work,
        sink=sink,
        budget=Budget(prepared.fit.spool_bytes),
        track=progress,
        reduction=options.reduction,
        labels=options.labels,
        seed=options.seed,
        keep_weights=prepared.weights_fit(),
        general=frozenset(mode["general"]),
        token_types=mode.get("token_types", False),
        covariances=covariances,
        ranks=ranks,
    )


def _first_mode(prepared: Prepared, say: Say) -> Mode:
    skeleton = prepared.skeleton
    reason = why_resident(skeleton)
    mode: Mode = {"general": [], "token_types": False}
    if prepared.options.engine == "resident":
        return mode | {"engine": "resident", "reason": "asked for", "singles": True}
    if reason is not None:
        return mode | _resident_mode(prepared, reason, say)
    singles = only_batches_of_one(skeleton, prepared.plan)
    return mode | {"engine": "stream", "reason": "a replayed sample agrees with plain autograd", "singles": singles}


def _resident_mode(prepared: Prepared, reason: str, say: Say) -> Mode:
    """Return what the mode is for a model that cannot be streamed, and say why.

    Raises:
        UnsupportedModelError: it is not possible either, or not wanted.
    """
    needed = prepared.fit.estimate.resident_bytes(prepared.plan)
    room = prepared.ranks.share(available_bytes(prepared.device), prepared.device)
    check_resident(
        prepared.source.id,
        prepared.skeleton,
        prepared.device,
        prepared.options.engine,
        reason,
        needed=needed,
        room=room,
    )
    say(f"the whole model is kept in memory: {reason}")
    return {"engine": "resident", "reason": reason, "singles": True}
