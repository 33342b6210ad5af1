"""A run of ``score``: sweeps of all checkpoints side by side, then the figures of their tokens.

The work folder notes which engine each checkpoint takes, how many visits are finished, and the figures of checkpoints
whose losses are taken. Killed at any moment, a run goes on from there to the same figures.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherkit._version import __version__
from fisherkit.artefacts.score_samples import check_samples, samples_bytes
from fisherkit.checkpoint.atomic import write_bytes
from fisherkit.checkpoint.schema import flag, listed, named, table, text, whole
from fisherkit.checkpoint.target import check_file, check_separate
from fisherkit.checkpoint.work_folder import MAY_REPLACE, Work, is_remains, read_progress
from fisherkit.engine.model.checks import model_files
from fisherkit.engine.model.findings import AttendsAhead, FoundInModel, NeedsBatchSizeOne
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.residence import check_resident, leaks, takes_token_types, why_resident
from fisherkit.engine.sweep.feed import Feed
from fisherkit.engine.sweep.forward import ForwardSweep
from fisherkit.engine.sweep.spool import Budget
from fisherkit.engine.sweep.walks import ForwardJob
from fisherkit.errors import FisherkitError, PromptError, ResumeError
from fisherkit.methods.score.candidates import Candidate
from fisherkit.methods.score.figures import SCHEMA, SampleFigures, choice_score, figures_of_set, set_score
from fisherkit.methods.score.prepare import Model, Prepared, prepare
from fisherkit.methods.score.report import CheckpointScore, Measure, ScoreReport
from fisherkit.methods.score.sample_rows import sample_rows
from fisherkit.options import ScoreOptions
from fisherkit.progress import Say, Track
from fisherkit.prompts.dataset import batches
from fisherkit.prompts.sources import PromptSource, input_files

Mode = dict[str, Any]
"""How a checkpoint is run: ``engine``, the ``reason``, ``singles`` (batches of one sample), ``token_types``."""

PROGRESS = table(
    {},
    {
        "groups": listed(listed(listed(whole(), 1), 1)),
        "modes": listed(
            table({"engine": text("stream", "resident"), "reason": text(), "singles": flag, "token_types": flag})
        ),
        "visits": whole(),
        "figures": named(SCHEMA),
        "publishing": flag,
    },
)
"""What the work folder of a run may say; see checkpoint.schema."""


def score_candidates(
    candidates: Sequence[Candidate],
    prompts: Mapping[str, PromptSource],
    options: ScoreOptions | None = None,
    *,
    samples: Path | None = None,
    beside: Mapping[Path, Callable[[ScoreReport], bytes]] | None = None,
    work: Path | None = None,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> ScoreReport:
    """Score checkpoints that are open.

    Args:
        candidates: in order; the first is what the others are compared with. Their blocks are read group by group, and
            within a group one candidate after the other.
        prompts: sources by the names of the sets.
        options: how prompts are read and models are run.
        samples: write a row per sample and checkpoint to this file of JSON lines.
        beside: files to make of the report, such as its picture.
        work: folder that a killed run goes on from; ``<samples>.partial`` if None. A run that writes nothing has a
            folder of the system's, which is gone with it.
        track: progress, called with stage, done and total.
        say: gets the lines meant for a person.

    Raises:
        FisherkitError: see ``fisherkit.errors``; a loss that is not finite names checkpoint and row.
    """
    options, beside = options or ScoreOptions(), beside or {}
    targets = [*([samples] if samples is not None else []), *beside]
    if work is None and targets:
        work = targets[0].with_name(f"{targets[0].name}.partial")
    if options.resume and work is not None and _may_replace(work):
        options = replace(options, force=True)
    _check_free(samples, targets, force=options.force)
    prepared = prepare(candidates, prompts, options, say)
    _check_apart([*targets, *([work] if work is not None else [])], prepared, prompts)
    with _open_work(work, prepared, say) as opened:
        figures = _measure(prepared, opened, track, say)
        report = _report(prepared, figures, opened.progress["modes"])
        contents = {samples: samples_bytes(sample_rows(prepared, figures))} if samples is not None else {}
        contents |= {path: make(report) for path, make in beside.items()}
        if not opened.progress.get("publishing"):
            _check_free(samples, targets, force=options.force)  # again: hours may have passed
            opened.commit(publishing=True)
        for path, content in contents.items():
            write_bytes(path, content)
        opened.remove()
    return report


def _may_replace(work: Path) -> bool:
    """Return whether a killed run was allowed to replace what lies at its outputs' names, or put it there itself."""
    left = read_progress(work, PROGRESS)
    return any(left.get(key, False) for key in ("publishing", MAY_REPLACE)) if left is not None else is_remains(work)


def _check_free(samples: Path | None, targets: Sequence[Path], *, force: bool) -> None:
    """Refuse outputs that are there already, or could not be written."""
    if samples is not None:
        check_samples(samples)
    for path in targets:
        check_file(path, force=force)


def _check_apart(written: Sequence[Path], prepared: Prepared, prompts: Mapping[str, PromptSource]) -> None:
    """Refuse an output that is an input, lies inside of one, or holds one."""
    inputs = [path for source in prompts.values() for path in input_files(source)]
    for model in prepared.models:
        inputs += model_files(model.candidate.source, model.candidate.tensors.index)
        inputs += [model.candidate.part.path] if model.candidate.part is not None else []
    check_separate(written, inputs)


@contextmanager
def _open_work(folder: Path | None, prepared: Prepared, say: Say) -> Iterator[Work]:
    """Go on with a killed run, or start afresh, and say which; without a folder in a temporary one."""
    ours, resume = prepared.fingerprint(), prepared.options.resume
    if folder is None:
        with (
            tempfile.TemporaryDirectory(prefix="fisherkit-score-") as parent,
            Work.start(Path(parent) / "w", ours) as w,
        ):
            yield w
        return
    force = prepared.options.force
    work = Work.resume(folder, ours, PROGRESS, may_replace=force) if resume else None
    if work is not None:
        say(f"going on with what is finished in {folder}")
    elif resume:
        say(f"nothing to resume in {folder}: starting from the beginning")
    elif folder.exists():
        say(f"{folder} is left over from an earlier run and is started over; --resume would go on with it")
    with work or Work.start(folder, ours, may_replace=force) as opened:
        try:
            yield opened
        except FisherkitError:
            if not opened.progress.get("visits"):
                opened.remove()  # refused before anything was finished
            raise


def _measure(prepared: Prepared, work: Work, track: Track, say: Say) -> list[SampleFigures]:
    """Run every checkpoint; one that turns out to need another way is run in that, and all start over."""
    modes = work.progress.get("modes") or [_first_mode(model, prepared, say) for model in prepared.models]
    groups = work.progress.get("groups") or [model.groups for model in prepared.models]
    if [[block for group in own for block in group] for own in groups] != [
        list(range(len(model.skeleton.blocks))) for model in prepared.models
    ] or len(modes) != len(prepared.models):
        raise ResumeError(f"{work.folder}: its progress does not add up; run again without --resume to start over")
    while True:
        work.commit(modes=modes, groups=groups)
        jobs = [
            _job(model, own, mode, prepared) for model, own, mode in zip(prepared.models, groups, modes, strict=True)
        ]
        budget = Budget(available_bytes(torch.device("cpu")) // 8)
        try:
            with ForwardSweep(jobs, work, budget, track) as sweep:
                sweep.run()
                return [_figures(prepared, number, sweep, work) for number in range(len(jobs))]
        except FoundInModel as found:
            modes[found.number] = _next_mode(prepared.models[found.number], modes[found.number], found, prepared, say)
            work.progress.pop("visits", None)
            work.progress.pop("figures", None)


def _job(model: Model, groups: Sequence[Sequence[int]], mode: Mode, prepared: Prepared) -> ForwardJob:
    singles = [(number,) for number in range(len(model.samples))]
    feed = Feed(
        skeleton=model.skeleton,
        samples=model.samples,
        batches=singles if mode["singles"] else batches(model.samples, prepared.options.tokens_per_batch),
        device=prepared.device,
        token_types=mode["token_types"],
    )
    return ForwardJob(
        feed=feed,
        source=model.candidate.tensors,
        groups=tuple(map(tuple, groups)),
        resident=mode["engine"] == "resident",
    )


def _first_mode(model: Model, prepared: Prepared, say: Say) -> Mode:
    mode: Mode = {"engine": "stream", "reason": "", "singles": False, "token_types": False}
    if prepared.options.engine == "resident":
        return mode | {"engine": "resident", "reason": "asked for", "singles": True}
    reason = why_resident(model.skeleton)
    return mode if reason is None else mode | _resident_mode(model, prepared, reason, say)


def _next_mode(model: Model, mode: Mode, found: FoundInModel, prepared: Prepared, say: Say) -> Mode:
    """Return how a checkpoint is run in view of a finding.

    Raises:
        UnsupportedModelError: it cannot be run at all.
    """
    if isinstance(found.finding, NeedsBatchSizeOne):
        return mode | {"singles": True}
    if isinstance(found.finding, AttendsAhead):
        if mode["token_types"] or not takes_token_types(model.skeleton):
            raise leaks(model.candidate.name, model.skeleton) from None
        return mode | {"token_types": True}
    return mode | _resident_mode(model, prepared, str(found.finding), say)


def _resident_mode(model: Model, prepared: Prepared, reason: str, say: Say) -> Mode:
    check_resident(model.candidate.name, model.skeleton, prepared.device, prepared.options.engine, reason)
    say(f"{model.candidate.name}: the whole model is kept in memory: {reason}")
    return {"engine": "resident", "reason": reason, "singles": True}


def _figures(prepared: Prepared, number: int, sweep: ForwardSweep, work: Work) -> SampleFigures:
    """Take the losses of one checkpoint, unless a killed run has them."""
    known = work.progress.get("figures", {})
    if str(number) in known:
        return SampleFigures.of_json(known[str(number)])
    model = prepared.models[number]
    found = SampleFigures.of_tokens(sweep.figures(number), model.samples)
    bad = np.flatnonzero(~np.isfinite(found.loss))
    if bad.size:
        raise FisherkitError(_not_finite(model, int(bad[0]), float(found.loss[bad[0]])))
    work.commit(figures=known | {str(number): found.as_json()})
    return found


def _not_finite(model: Model, sample: int, loss: float) -> str:
    """Say which sample has a loss that is not finite, of which checkpoint, and what may help."""
    for one in model.sets:
        if sample < len(one.samples):
            break
        sample -= len(one.samples)
    dtype = str(model.skeleton.dtype).removeprefix("torch.")
    return (
        f"{model.candidate.name}: the loss of {one.name}, row {one.samples[sample].row + 1}, is {loss}; the model "
        f"overflows in {dtype}, try --dtype float32 (or bfloat16 instead of float16)"
    )


def _report(prepared: Prepared, figures: Sequence[SampleFigures], modes: Sequence[Mode]) -> ScoreReport:
    by_bytes = prepared.options.by_bytes
    measure: Measure = "bits_per_byte" if by_bytes else "loss"
    checkpoints = []
    for number, (model, own) in enumerate(zip(prepared.models, figures, strict=True)):
        sets, start = {}, 0
        for place, one in enumerate(model.sets):
            rows = _common_rows(prepared, place)
            first_start = sum(len(before.samples) for before in prepared.models[0].sets[:place])
            first = figures_of_set(prepared.models[0].sets[place], first_start, figures[0], rows) if number else None
            found = figures_of_set(one, start, own, rows)
            sets[one.name] = set_score(found, first, measure, choice_score(one, start, own, rows))
            start += len(one.samples)
        checkpoints.append(CheckpointScore(name=model.candidate.name, sets=sets, engine=modes[number]["engine"]))
    return ScoreReport(
        measure=measure,
        sets={one.name: _read(one.prompts.report) for one in prepared.models[0].sets},
        checkpoints=checkpoints,
        made=_made(prepared),
    )


def _common_rows(prepared: Prepared, place: int) -> frozenset[int]:
    """Return the rows of a set that every checkpoint has a sample of.

    Raises:
        PromptError: there is none.
    """
    sets = [model.sets[place] for model in prepared.models]
    rows = frozenset.intersection(*(frozenset(one.samples[at].row for at in one.scored) for one in sets))
    if not rows:
        raise PromptError(f"{sets[0].name}: no row is left that every checkpoint could use; raise --max-length")
    return rows


def _read(report: Any) -> dict[str, Any]:
    """Return what was read of a set, as JSON."""
    names = ("source", "kind", "field", "rows", "samples", "tokens", "loss_tokens", "skipped", "truncated")
    return {name: getattr(report, name) for name in (*names, "chat_template", "loss", "max_length", "sha256")}


def _made(prepared: Prepared) -> dict[str, Any]:
    options = asdict(prepared.options)
    for name in ("resume", "force", "trust_remote_code"):
        options.pop(name)
    return {
        "fisherkit": __version__,
        "versions": prepared.fingerprint()["versions"],
        "device": str(prepared.device),
        "dtypes": [str(model.skeleton.dtype).removeprefix("torch.") for model in prepared.models],
        "options": options,
    }
