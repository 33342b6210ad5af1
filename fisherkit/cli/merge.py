"""``fisherkit merge``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fisherkit.cli import console, shared
from fisherkit.cli import sweep as sweeps
from fisherkit.cli.app import Command, Debug, Force, Json, Quiet, Resume, app, run, sayer
from fisherkit.cli.merge_sweep import one_point, points_of, sweep_merge
from fisherkit.cli.run_options import (
    ChatTemplate,
    Device,
    DType,
    Field,
    GroupSize,
    Limit,
    Loss,
    MaxLength,
    TrustRemoteCode,
    run_options,
)
from fisherkit.cli.shared import Base, Nan, Only, Report, Rest, Shard, ShardSize, Skip, Tuned
from fisherkit.cli.sweep import BudgetText, Controls, Prompts, Samples
from fisherkit.errors import OptionError
from fisherkit.options import MergeOptions, Side
from fisherkit.options.checks import parse_weights

HOW, SOLVE = "What is done to the delta", "Or solve for it"


_BETWEEN = "\0"  # no file's name has it


class _MergeCommand(Command):
    """The command; ``--also`` takes two words and may be given again, which typer's annotations cannot say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, the two words of an ``--also`` as one."""
        joined: list[str] = []
        for word in args:
            if joined[-2:-1] == ["--also"] and _BETWEEN not in joined[-1] and not word.startswith("-"):
                joined[-1] += _BETWEEN + word
            else:
                joined.append(word)
        return super().parse_args(ctx, joined)


def _old_and_new(given: tuple[str, Path] | None) -> tuple[Path | None, Path] | None:
    return (None if given[0] == "none" else Path(given[0]), given[1]) if given is not None else None


def _tune_and_new(given: str) -> tuple[str, Path]:
    tune, between, new = given.partition(_BETWEEN)
    if not between:
        raise OptionError("--also takes two words, FT2 and NEW2: a further fine-tune and its file")
    return tune, Path(new)


def _solve_beside(figure: Path | None) -> dict[Path, Callable[[Any], bytes]]:
    """Return what draws a solve, by the path of the figure; empty where none is asked for."""
    if figure is None:
        return {}
    from fisherkit.render.files import check_figure, solve_bytes

    if figure.suffix.lower() == ".png":
        raise OptionError(f"{figure}: the figure of a solve ends in .html or .svg")
    check_figure(figure, force=True)  # the run itself knows what a killed one has put there
    return {figure: lambda made: solve_bytes(made, figure.suffix.lower())}


@app.command(cls=_MergeCommand)
def merge(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder to make.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Take FT only where it allows change.", rich_help_panel=HOW)] = None,
    subspace: Annotated[
        Path | None, typer.Option(help="Remove what lies in its directions.", rich_help_panel=HOW)
    ] = None,
    side: Annotated[
        Side, typer.Option(help="Directions of outputs (left), of inputs (right), or both.", rich_help_panel=HOW)
    ] = "both",
    layer_scale: Annotated[
        Path | None,
        typer.Option(help="A layer_importance.json: important layers change less.", rich_help_panel=HOW),
    ] = None,
    power: Annotated[
        str, typer.Option(help="Scale of a layer: (median/its importance)^power,", rich_help_panel=HOW)
    ] = "0.5",
    floor: Annotated[str, typer.Option(help="but not below this, nor above 1.", rich_help_panel=HOW)] = "0.1",
    alpha: Annotated[
        str,
        typer.Option(
            help="Factor of all of the delta; alone it is Wise-FT. With --prompts, several: 0.1,0.3,0.5; so with "
            "every strength.",
            rich_help_panel=HOW,
        ),
    ] = "1.0",
    regmean: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            metavar="OLD NEW",
            help="Files of extract --statistics inputs, of BASE on old prompts (or none) and of FT on the new "
            "task's: the delta that least disturbs both.",
            rich_help_panel=SOLVE,
        ),
    ] = None,
    fisher: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="OLD NEW", help="The same with their Fishers, weight by weight.", rich_help_panel=SOLVE),
    ] = None,
    old_weight: Annotated[
        str, typer.Option(help="What OLD counts beside NEW; 0 gives FT.", rich_help_panel=SOLVE)
    ] = "1.0",
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="FT2 NEW2", help="A further fine-tune of BASE, and its NEW.", rich_help_panel=SOLVE),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W", help="What FT and each of --also count, such as 1,2.", rich_help_panel=SOLVE),
    ] = None,
    damping: Annotated[
        str | None,
        typer.Option(
            help="Added to NEW everywhere, as a share of its mean.",
            show_default="0.001, of Fishers 0.000001",
            rich_help_panel=SOLVE,
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(help="Besides, the best adapter of this rank, in OUT/lora; of --regmean.", rich_help_panel=SOLVE),
    ] = None,
    force_model: Annotated[
        bool,
        typer.Option("--force-model", help="Take OLD and NEW of a close relative of BASE.", rich_help_panel=SOLVE),
    ] = False,
    only: Only = None,
    skip: Skip = None,
    rest: Rest = "tuned",
    nan: Nan = "refuse",
    resume: Resume = False,
    shard: Shard = None,
    max_shard_size: ShardSize = None,
    report: Report = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Draw a sweep, or what --regmean keeps of each weight: .html, .svg, of a sweep .png.",
            rich_help_panel=sweeps.SWEEP,
        ),
    ] = None,
    prompts: Prompts = None,
    budget: BudgetText = None,
    controls: Controls = False,
    samples: Samples = None,
    field: Field = None,
    limit: Limit = 200,
    max_length: MaxLength = 256,
    chat_template: ChatTemplate = "auto",
    loss: Loss = "auto",
    group_size: GroupSize = 8,
    dtype: DType = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put a fine-tune onto BASE as far as a mask, a subspace and the layers' importance allow.

    Example: fisherkit merge org/base my-fine-tune out --mask mask.safetensors
    """

    def command() -> None:
        options = MergeOptions(
            mask=mask,
            subspace=subspace,
            side=side,
            layer_scale=layer_scale,
            regmean=_old_and_new(regmean),
            fisher=_old_and_new(fisher),
            also=tuple(map(_tune_and_new, also or ())),
            weights=parse_weights(weights) if weights is not None else None,
            lora_rank=lora_rank,
            force_model=force_model,
            **shared.pair_options(
                only=only,
                skip=skip,
                rest=rest,
                nan=nan,
                max_shard_size=max_shard_size,
                resume=resume,
                force=force,
                shard=shard,
            ),
        )
        strengths = {"power": power, "floor": floor, "alpha": alpha, "old_weight": old_weight}
        strengths |= {"damping": damping} if damping is not None else {}
        points = points_of(options, strengths)
        sweep = sweeps.ask(
            prompts,
            budget,
            run_options(
                field=field,
                limit=limit,
                max_length=max_length,
                chat_template=chat_template,
                loss=loss,
                group_size=group_size,
                dtype=dtype,
                device=device,
                resume=resume,
                trust_remote_code=trust_remote_code,
                force=force,
            ),
            controls=controls,
            outputs=(out, None),
            figures=report,
            picture=figure,
            samples=samples,
        )
        if sweep is not None:
            sweep_merge((base, tuned), points, sweep, as_json=as_json, quiet=quiet)
            return
        own, target = one_point(points, out)
        if figure is not None and own.regmean is None:
            raise OptionError(
                "--figure draws a --regmean, or a sweep that is scored; add --prompts old=FILE --prompts new=FILE"
            )
        if report is not None:
            from fisherkit.render.files import check_report

            check_report(report, force=True)  # the run itself knows what a killed one has put there
        from fisherkit.methods.merge import merge as methods

        made = methods.merge(
            base,
            tuned,
            target,
            own,
            beside={**shared.report_beside(report), **_solve_beside(figure)},
            command=shared.typed(),
            track=console.tracker("merge", quiet=quiet),
            say=sayer(quiet),
        )
        console.say_kept(made.totals, selects=False, quiet=quiet or bool(made.missing))
        shared.show_made(made, target, as_json=as_json)

    hint = sweeps.hint((out, None), samples, figure, report) if prompts else shared.hint(out)
    run(command, debug=debug, hint=hint)
