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

from fisherkit.cli.app import MACHINE
from fisherkit.errors import FisherkitError, OptionError
from fisherkit.options import ScoreOptions
from fisherkit.options import extract as choices
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
    typer.Option(help="Score every point on NAME=FILE; give it for each set.", rich_help_panel=SWEEP),
]
BudgetText = Annotated[
    list[str] | None,
    typer.Option(
        help="What a set may lose: old:+0.02 (nats per token), old:-1% (exact matches); the first set: +0.02.",
        rich_help_panel=SWEEP,
    ),
]
Controls = Annotated[bool, typer.Option("--controls", help="Score controls beside the points.", rich_help_panel=SWEEP)]
Limit = Annotated[int, typer.Option(help="Use the first so many rows; 0 for all.", rich_help_panel=SWEEP)]
MaxLength = Annotated[int, typer.Option(help="Tokens per sample; longer ones are cut.", rich_help_panel=SWEEP)]
LossTokens = Annotated[choices.Loss, typer.Option(help="Tokens that count, as in extract.", rich_help_panel=SWEEP)]
GroupSize = Annotated[
    int, typer.Option(help="Layers in memory at a time; lowered if they do not fit.", rich_help_panel=MACHINE)
]
DType = Annotated[choices.DType, typer.Option(help="What is computed in.", rich_help_panel=MACHINE)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.", rich_help_panel=MACHINE)]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Request to score points.

    Attributes:
        prompts: prompt sets by name.
        budgets: what they may lose; at least one.
        controls: score controls, too.
        options: of score.
    """

    prompts: Mapping[str, str]
    budgets: "Sequence[Budget]"
    controls: bool
    options: ScoreOptions


def ask(prompts: list[str] | None, budget: list[str] | None, *, controls: bool, **options: Any) -> Sweep | None:
    """Return what is asked for; None where no prompts are given.

    Args:
        prompts: texts NAME=FILE.
        budget: texts, see options.budget.
        controls: as Sweep has them.
        options: of ScoreOptions.

    Raises:
        OptionError: options that contradict each other, or make no sense without prompts.
    """
    if not prompts:
        given = [name for name, value in (("budget", budget), ("controls", controls)) if value]
        if given:
            raise OptionError(f"--{given[0]} is for a sweep that is scored; add --prompts old=FILE --prompts new=FILE")
        return None
    from fisherkit.methods.score.advice import check_budgets

    sets = _sets(prompts)
    budgets = check_budgets([parse_budget(text) for text in budget or ()], tuple(sets))
    return Sweep(prompts=sets, budgets=budgets, controls=controls, options=ScoreOptions(**options))


def _sets(prompts: Sequence[str]) -> dict[str, str]:
    sets: dict[str, str] = {}
    for text in prompts:
        name, found, source = text.partition("=")
        if not found or not name.strip() or not source:
            raise OptionError(f"--prompts takes NAME=FILE, such as old=general.jsonl, not {text!r}")
        if name in sets:
            raise OptionError(f"--prompts {name}: two sets of that name; give each its own")
        sets[name] = source
    return sets


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
    options = replace(sweep.options, group_size=_fitting(points, sweep.options.group_size, say))
    with Reader(pair.base.index) as base:
        candidates = [Candidate(BASE, pair.base_source, base)]
        for name, virtual in zip((TUNED, *names), (points.tuned, *points.virtual), strict=True):
            candidates.append(Candidate(name, ModelSource(points.folder, name, None), ComputedReader(virtual)))
        return score_candidates(candidates, sweep.prompts, options, track=track, say=say)


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


def check(
    targets: "Targets | None",
    beside: tuple[Path | None, Path | None],
    inputs: Sequence[str],
    *,
    force: bool,
    resume: bool,
) -> None:
    """Refuse before any work what could only fail after it.

    Args:
        targets: what will be written of the chosen point.
        beside: the file for figures (.json), and the picture.
        inputs: BASE and FT.
        force: earlier outputs may be replaced.
        resume: what a killed run left is gone on with.

    Raises:
        OptionError, OutputError, MissingLibraryError: see above.
    """
    from fisherkit.checkpoint.target import check_apart, check_target
    from fisherkit.render.files import check_figure, check_report

    details, picture = beside
    if details is not None:
        check_report(details, force=force)
    if picture is not None:
        check_figure(picture, force=force)
    if targets is not None:
        for path in (targets.checkpoint, targets.delta):
            if path is not None:
                check_target(path, force=force or resume)
    written = [path for path in beside if path is not None]
    check_apart(written, [Path(one) for one in inputs], targets.main if targets is not None else None)


def conclude(
    report: "ScoreReport",
    sweep: Sweep,
    points: Sequence[str],
    controls: Sequence[str],
    beside: tuple[Path | None, Path | None],
    *,
    as_json: bool,
    say: Say,
) -> "Advice":
    """Print the table on stdout and the advice for people; write picture and figures where they are asked for.

    Args:
        report: of score.
        sweep: what was asked for.
        points: names of the checkpoints to choose among.
        controls: names of those beside them.
        beside: the file for figures (.json), and the picture.
        as_json: print everything as JSON instead.
        say: for people.
    """
    from fisherkit.checkpoint.atomic import write_json
    from fisherkit.cli import console
    from fisherkit.methods.score.advice import advise
    from fisherkit.render import files, score_view

    advice = advise(report, sweep.budgets, points, controls, TUNED)
    details, picture = beside
    whole = {**report.as_json(), "advice": {"chosen": advice.chosen, "line": advice.line}}
    if details is not None:
        write_json(details, whole)
    if picture is not None:
        files.write_score(report, picture, [f"Advice: {advice.line}."])
    if as_json:
        typer.echo(json.dumps(whole, indent=1))
    else:
        rows = score_view.records(report)
        console.show_rows(rows, tuple(rows[0]))
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
