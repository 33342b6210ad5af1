"""Sweeps by measurement, which ``fapm`` and ``merge`` share: every point is scored without being written.

BASE and FT are always among the points. What comes out is a table, a picture where one is asked for, and one line of
advice: the point that does best on the new task without costing more of the old than a budget allows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisherkit.cli import console
from fisherkit.cli.run_options import named_prompts
from fisherkit.errors import FisherkitError, OptionError
from fisherkit.options import ScoreOptions
from fisherkit.options.budget import parse_budget
from fisherkit.progress import Say, Track

if TYPE_CHECKING:
    from fisherkit.methods.merge.points import Points
    from fisherkit.methods.score.advice import Advice
    from fisherkit.methods.score.report import ScoreReport
    from fisherkit.options.budget import Budget
    from fisherkit.pairs.outputs import Targets

SWEEP = "Strengths by what they measure"
BASE, TUNED = "BASE", "FT"
_SHARE = 6  # of the free memory; weights, activations and logits need the rest

Prompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help="Score every point on a prompt set, such as old=general.jsonl; several times for several sets.",
        rich_help_panel=SWEEP,
    ),
]
BudgetText = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:CHANGE",
        help="What a set may lose: old:+0.02 (nats per token), old:-1% (exact matches); the first set: +0.02.",
        rich_help_panel=SWEEP,
    ),
]
Controls = Annotated[bool, typer.Option("--controls", help="Score controls beside the points.", rich_help_panel=SWEEP)]
Samples = Annotated[
    Path | None, typer.Option(help="Write a row per sample and point, .jsonl; for inspect.", rich_help_panel=SWEEP)
]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Request to score points.

    Attributes:
        prompts: sources of prompt sets by name.
        budgets: what they may lose; at least one.
        controls: score controls, too.
        options: of score.
        outputs: the checkpoint and the sparse delta to write of the point that is chosen.
        figures: the file for all figures, .json.
        picture: the picture.
        samples: the file for rows of samples.
    """

    prompts: Mapping[str, list[str]]
    budgets: "Sequence[Budget]"
    controls: bool
    options: ScoreOptions
    outputs: tuple[Path | None, Path | None]
    figures: Path | None
    picture: Path | None
    samples: Path | None

    @property
    def work(self) -> Path | None:
        """Folder that a killed sweep goes on from; none where nothing is written."""
        return _work_folder(self.outputs, self.samples, self.picture, self.figures)

    def targets(self) -> "Targets | None":
        """Return where the chosen point goes; None for nowhere."""
        from fisherkit.pairs.outputs import Targets

        out, sparse = self.outputs
        return Targets(checkpoint=out, delta=sparse) if any(self.outputs) else None


def _work_folder(outputs: tuple[Path | None, Path | None], *beside: Path | None) -> Path | None:
    main, other = outputs[0] or outputs[1], next(filter(None, beside), None)
    if main is not None:
        return Path(f"{main}.sweep.partial")
    return Path(f"{other}.partial") if other is not None else None


def hint(outputs: tuple[Path | None, Path | None], *beside: Path | None) -> str:
    """Return what a person who interrupted a sweep should know.

    Args:
        outputs: see Sweep.
        beside: samples, picture and figures.
    """
    work = _work_folder(outputs, *beside)
    return f"What is finished is in {work}; --resume goes on with it." if work is not None else ""


def ask(prompts: list[str] | None, budget: list[str] | None, options: Mapping[str, Any], **asked: Any) -> Sweep | None:
    """Return what is asked for; None where no prompts are given.

    Args:
        prompts: texts NAME=FILE.
        budget: texts, see options.budget.
        options: of ScoreOptions.
        asked: the other attributes of Sweep.

    Raises:
        OptionError: options that contradict each other, or make no sense without prompts.
    """
    if not prompts:
        given = [name for name in ("controls", "samples") if asked[name]]
        if budget or given:
            name = "budget" if budget else given[0]
            raise OptionError(f"--{name} is for a sweep that is scored; add --prompts old=FILE --prompts new=FILE")
        return None
    from fisherkit.methods.score.advice import check_budgets

    sets = named_prompts(prompts)
    budgets = check_budgets([parse_budget(text) for text in budget or ()], tuple(sets))
    sweep = Sweep(prompts=sets, budgets=budgets, options=ScoreOptions(**options), **asked)
    if sweep.options.resume and sweep.work is None:
        raise OptionError("--resume goes on from the folder beside an output; give one")
    return sweep


def check(sweep: Sweep, inputs: Sequence[str]) -> None:
    """Refuse before any work what could only fail after it.

    Args:
        sweep: what is asked for.
        inputs: BASE and FT.

    Raises:
        OptionError, OutputError, MissingLibraryError: see above.
    """
    from fisherkit.checkpoint.target import check_apart, check_target
    from fisherkit.render.files import check_figure, check_report

    force = sweep.options.force or sweep.options.resume  # a killed run may have made some of its outputs
    if sweep.figures is not None:
        check_report(sweep.figures, force=force)
    if sweep.picture is not None:
        check_figure(sweep.picture, force=force)
    for path in sweep.outputs:
        if path is not None:
            check_target(path, force=sweep.options.force or (force and _is_under_way(sweep)))
    written = [path for path in (sweep.figures, sweep.picture, sweep.samples) if path is not None]
    check_apart(written, [Path(one) for one in inputs], sweep.outputs[0])


def _is_under_way(sweep: Sweep) -> bool:
    """Return whether a killed run was writing the outputs: some may be in place already, and are its own."""
    targets = sweep.targets()
    return targets is not None and targets.work_folder.exists()


def score_points(points: "Points", names: Sequence[str], sweep: Sweep, track: Track, say: Say) -> "ScoreReport":
    """Score BASE, FT and every point.

    Args:
        points: open.
        names: of the points, in their order.
        sweep: the sets and options.
        track: progress.
        say: remarks for people.
    """
    from fisherkit.checkpoint.computed_reader import ComputedReader
    from fisherkit.checkpoint.hub import ModelSource
    from fisherkit.checkpoint.torch_reader import Reader
    from fisherkit.methods.score.candidates import Candidate
    from fisherkit.methods.score.run import score_candidates

    pair = points.run.checkpoints
    given = sweep.options
    fitting = _fitting(points, given.group_size, say)
    options = replace(given, group_size=fitting, force=given.force or given.resume)
    with Reader(pair.base.index) as base:
        candidates = [Candidate(BASE, pair.base_source, base)]
        for name, virtual in zip((TUNED, *names), (points.tuned, *points.virtual), strict=True):
            candidates.append(Candidate(name, ModelSource(points.folder, name, None), ComputedReader(virtual)))
        return score_candidates(
            candidates, sweep.prompts, options, samples=sweep.samples, work=sweep.work, track=track, say=say
        )


def room_for_points() -> int:
    """Return the bytes that points may remember in common: a share of what is free."""
    import torch

    from fisherkit.engine.model.memory import available_bytes

    return available_bytes(torch.device("cpu")) // _SHARE


def _fitting(points: "Points", wanted: int, say: Say) -> int:
    """Return the layers of a group of which points can remember what they keep, and say where that is fewer."""
    room, layers = room_for_points(), wanted
    while layers > 1 and points.remembered(layers) > room:
        layers -= 1
    if layers < wanted:
        say(f"group size lowered from {wanted} to {layers}: what the points keep of more would not fit the memory")
    return layers


def conclude(
    report: "ScoreReport", sweep: Sweep, points: Sequence[str], controls: Sequence[str], *, as_json: bool, say: Say
) -> "Advice":
    """Print the table on stdout and the advice for people; write picture and figures where they are asked for.

    Args:
        report: of score.
        sweep: what was asked for.
        points: names of the checkpoints to choose among.
        controls: names of those beside them.
        as_json: print everything as JSON instead.
        say: for people.
    """
    from fisherkit.checkpoint.atomic import write_json
    from fisherkit.methods.score.advice import advise, front_of
    from fisherkit.render import files

    advice = advise(report, sweep.budgets, points, controls, TUNED)
    best = front_of(report)
    whole = {**report.as_json(), "front": best, "advice": {"chosen": advice.chosen, "line": advice.line}}
    if sweep.figures is not None:
        write_json(sweep.figures, whole)
    if sweep.picture is not None:
        files.write_score(report, sweep.picture, [f"Advice: {advice.line}."])
    if as_json:
        typer.echo(json.dumps(whole, indent=1, allow_nan=False))
    else:
        console.show_score(report)
    say(f"front: {', '.join(best)}; no other is better on one set and as good on the others")
    say(f"advice: {advice.line}")
    return advice


def chosen_or_refuse(advice: "Advice", out: Path) -> str:
    """Return the point to write.

    Raises:
        FisherkitError: none is within the budget.
    """
    if advice.chosen is None:
        raise FisherkitError(f"{out}: nothing is written: {advice.line}; raise --budget, or sweep on")
    return advice.chosen
