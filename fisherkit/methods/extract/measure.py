"""``extract``: the diagonal Fisher of a language model on a prompt set.

F_i = 1/N sum_n (d l_n / d theta_i)^2, l_n the negative log-likelihood of sample n over its loss tokens (arXiv
1612.00796; with the data's labels the empirical Fisher, arXiv 2502.11756). The square is per sample, never per batch.

A run has three parts: ``prepare`` decides everything, an engine fills files in the work folder, and ``publish`` renames
them once all of them, JSON included, are whole. Killed at any moment, ``--resume`` goes on to the same bits.
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.hub import resolve_model
from fisherkit.checkpoint.work_folder import Work, is_remains, may_replace, read_progress
from fisherkit.engine.model.device import choose_device
from fisherkit.engine.ranks.places import take_local_gpu
from fisherkit.engine.ranks.ranks import ALONE, Ranks
from fisherkit.engine.ranks.start import open_ranks
from fisherkit.errors import FisherkitError, OutputError, RankFailedError, ResumeError
from fisherkit.methods.extract.checks import check_alike, check_apart
from fisherkit.methods.extract.engines import PROGRESS
from fisherkit.methods.extract.fisher_output import FisherOutput
from fisherkit.methods.extract.fit import refuse_misfit
from fisherkit.methods.extract.inputs_output import InputsOutput
from fisherkit.methods.extract.output import ExtractReport, Output, damaged
from fisherkit.methods.extract.prepare import Prepared, prepare
from fisherkit.methods.extract.provenance import digest, fingerprint
from fisherkit.options import ExtractOptions
from fisherkit.progress import Say, Track
from fisherkit.prompts.sources import PromptSource


def extract(
    model: str | os.PathLike[str],
    prompts: PromptSource,
    out: str | os.PathLike[str],
    options: ExtractOptions | None = None,
    *,
    distributed: bool = False,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> ExtractReport:
    """Measure the diagonal Fisher of ``model`` on ``prompts`` and write it to ``out``.

    Args:
        model: a local checkpoint, or ``org/name[@revision]``.
        prompts: a file, folder or pattern, ``builtin``, ``-`` for stdin, a data set of the hub, or several of these.
        out: ``.pt``, ``.safetensors``, or a folder; bf16 (or fp32) tensors shaped like the weights, by their
            checkpoint names. Of ``statistics="inputs"`` a ``.safetensors`` file of covariances.
        options: what to measure and how.
        distributed: measure together with the other processes that torchrun has started, or that form the default group
            of torch.distributed; each of them must call this. Alone where there are none.
        track: progress, called with stage, done and total.
        say: gets the lines meant for a person; of several processes the first one alone speaks.

    Raises:
        FisherkitError: see ``fisherkit.errors``; nothing is at ``out`` then, and what was finished is kept in
            ``<out>.partial/`` for ``resume``.
    """
    options = options or ExtractOptions()
    if distributed:
        take_local_gpu(options.device)
    joined = open_ranks(choose_device(options.device)) if distributed else nullcontext(ALONE)
    with joined as ranks:
        return _extract(os.fspath(model), prompts, Path(out), options, ranks.track(track), ranks.say(say), ranks)


def _extract(
    model: str, prompts: PromptSource, out: Path, options: ExtractOptions, track: Track, say: Say, ranks: Ranks
) -> ExtractReport:
    options, may_be_finished = ranks.from_first(lambda: _look(model, out, options))
    output = _output(out, options)
    prepared = prepare(model, prompts, options, say, ranks=ranks)
    assert prepared.prompts is not None
    with ranks.together():
        check_apart((*output.written, output.partial), prepared.source, prepared.skeleton, prompts)
    say(prepared.prompts.report.line())
    say(prepared.line())
    for remark in ranks.remarks:
        say(remark)
    ours = fingerprint(prepared)
    check_alike(ours, ranks)
    if ranks.from_first(lambda: may_be_finished and output.is_of(digest(ours))):
        say(f"{output.path}: is finished already")
        if ranks.is_first and is_remains(output.partial):
            with Work.start(output.partial, ours) as work:
                work.remove()
        return ranks.from_first(output.report)
    started = time.monotonic()
    with _open_work(output.partial, ours, options, say, ranks) as work:
        try:
            if "publishing" not in work.progress:
                ranks.from_first(output.check_free)  # again: another run may have finished since
                output.fill(_with_groups(prepared, work), work, track, say, run=digest(ours), started=started)
            ranks.from_first(lambda: output.publish(work))
        except FisherkitError as error:
            if _is_refusal(error, work.progress):
                work.remove()
            raise
        ranks.drop_spools(work)
        work.remove()
    return ranks.from_first(output.report)


def _look(model: str, out: Path, options: ExtractOptions) -> tuple[ExtractOptions, bool]:
    """Refuse an output that is there already; return whether it may be what --resume wants to go on with.

    The options are those of the run that is gone on with, where that was allowed to replace its output.
    """
    output = _output(out, options)
    resolve_model(model, weights=False)  # a model that is not there is named before the output is refused
    if may_replace(output.partial, PROGRESS, resume=options.resume):
        options = dataclasses.replace(options, force=True)
        output = _output(out, options)
    left = read_progress(output.partial, PROGRESS) if options.resume else None
    if left and options.batch_tokens is None:  # as for groups: free memory may be another now
        options = dataclasses.replace(options, batch_tokens=left.get("batch_tokens"))
    may_be_finished = options.resume and left is None and output.path.exists()
    if not may_be_finished and not (left and "publishing" in left):
        output.check_free()
    return options, may_be_finished


def _output(out: Path, options: ExtractOptions) -> Output:
    return InputsOutput(out, options) if options.statistics == "inputs" else FisherOutput(out, options)


@contextmanager
def _open_work(
    partial: Path, ours: Mapping[str, str], options: ExtractOptions, say: Say, ranks: Ranks
) -> Iterator[Work]:
    """Open the work folder in the first process, inside the ``with``; the others look at it."""
    with ExitStack() as stack:
        with ranks.together():
            held = stack.enter_context(_go_on(partial, ours, options, say)) if ranks.is_first else None
        yield ranks.share_work(held, partial)


def _go_on(partial: Path, ours: Mapping[str, str], options: ExtractOptions, say: Say) -> Work:
    """Go on with a killed run, or start afresh, and say which."""
    if options.resume:
        work = Work.resume(partial, ours, PROGRESS, may_replace=options.force)
        if work is not None:
            say(f"going on with what is finished in {partial}")
            return work
        say(f"nothing to resume in {partial}: starting from the beginning")
    elif partial.exists():
        say(f"{partial} is left over from an earlier run and is started over; --resume would go on with it")
    return Work.start(partial, ours, may_replace=options.force)


def _with_groups(prepared: Prepared, work: Work) -> Prepared:
    """Note groups and batches of a run, or take the groups of a killed one: free memory may be another by then."""
    groups = work.progress.get("groups")
    if groups is not None:
        if [block for group in groups for block in group] != list(range(len(prepared.skeleton.blocks))):
            raise damaged(work)
        again = prepared.fit.with_groups(tuple(map(tuple, groups)), prepared.skeleton)
        if prepared.options.engine != "resident" and work.progress.get("mode", {}).get("engine") != "resident":
            refuse_misfit(again, prepared.skeleton, prepared.prompts, prepared.options, prepared.source.id)
        prepared = dataclasses.replace(prepared, fit=again)
    work.commit(groups=prepared.plan.groups, batch_tokens=prepared.options.tokens_per_batch)
    return prepared


def _is_refusal(error: FisherkitError, progress: Mapping[str, Any]) -> bool:
    """Return whether a run that failed would fail again, or has nothing to go on with: its work folder is dropped.

    Once a part of the Fisher is finished nothing is dropped: a file that could not be read may be there tomorrow.
    """
    if isinstance(error, RankFailedError):
        return False  # the others may still be at work there
    if isinstance(error, OutputError):
        return "groups" not in progress  # refused before it began; a full disk can be emptied
    finished = "sink" in progress or progress.get("moments", {}).get("figures")
    return not finished and not isinstance(error, ResumeError)
