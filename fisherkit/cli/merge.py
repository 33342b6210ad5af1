"""``fisherkit merge``."""

from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli import console, shared
from fisherkit.cli.app import Command, Debug, Force, Json, Quiet, Resume, app, run, sayer
from fisherkit.cli.shared import Base, Nan, Only, Report, Rest, ShardSize, Skip, Tuned
from fisherkit.options import MergeOptions, Side

HOW = "What is done to the delta"


@app.command(cls=Command)
def merge(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
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
        float, typer.Option(help="Scale of a layer: (median/its importance)^power,", rich_help_panel=HOW)
    ] = 0.5,
    floor: Annotated[float, typer.Option(help="but not below this, nor above 1.", rich_help_panel=HOW)] = 0.1,
    alpha: Annotated[
        float, typer.Option(help="Factor of all of the delta; alone it is Wise-FT.", rich_help_panel=HOW)
    ] = 1.0,
    only: Only = None,
    skip: Skip = None,
    rest: Rest = "tuned",
    nan: Nan = "refuse",
    resume: Resume = False,
    max_shard_size: ShardSize = None,
    report: Report = None,
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
            power=power,
            floor=floor,
            alpha=alpha,
            **shared.pair_options(
                only=only,
                skip=skip,
                rest=rest,
                nan=nan,
                max_shard_size=max_shard_size,
                resume=resume,
                force=force,
            ),
        )
        if report is not None:
            from fisherkit.render.files import check_report

            check_report(report, force=True)  # the run itself knows what a killed one has put there
        from fisherkit.methods.merge import merge as methods

        made = methods.merge(
            base,
            tuned,
            out,
            options,
            beside=shared.report_beside(report),
            command=shared.typed(),
            track=console.tracker("merge", quiet=quiet),
            say=sayer(quiet),
        )
        console.say_kept(made.totals, selects=False, quiet=quiet)
        shared.show_made(made, out, as_json=as_json)

    run(command, debug=debug, hint=shared.hint(out))
