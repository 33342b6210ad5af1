"""``fisherkit merge``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fisherkit.checkpoint.target import check_apart
from fisherkit.cli import console
from fisherkit.cli.app import OUTPUT, Debug, Force, Json, Quiet, Resume, app, run, sayer
from fisherkit.cli.shared import Base, Nan, Only, Rest, ShardSize, Skip, hint, shard_bytes, typed
from fisherkit.options import MergeOptions

HOW = "What is done to the delta"


@app.command()
def merge(
    base: Base,
    tuned: Annotated[
        str, typer.Argument(metavar="FT", help="What was made of it: a checkpoint, a PEFT adapter, or a sparse delta.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    mask: Annotated[Path | None, typer.Option(help="Take FT only where it allows change.", rich_help_panel=HOW)] = None,
    subspace: Annotated[
        Path | None, typer.Option(help="Remove what lies in its directions.", rich_help_panel=HOW)
    ] = None,
    side: Annotated[
        str, typer.Option(help="Directions of outputs (left), inputs (right), both.", rich_help_panel=HOW)
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
    report: Annotated[
        Path | None, typer.Option(help="Write figures per tensor, .json.", rich_help_panel=OUTPUT)
    ] = None,
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
            side=side,  # type: ignore[arg-type]  # checked by the dataclass
            layer_scale=layer_scale,
            power=power,
            floor=floor,
            alpha=alpha,
            only=tuple(only or ()),
            skip=tuple(skip or ()),
            rest=rest,  # type: ignore[arg-type]
            nan=nan,  # type: ignore[arg-type]
            resume=resume,
            shard_bytes=shard_bytes(max_shard_size),
            force=force,
        )
        if report is not None:
            from fisherkit.render.files import check_report

            check_report(report, force=force)
            given = [path for path in (mask, subspace, layer_scale) if path is not None]
            beside = [path.with_suffix(".json") for path in given]
            check_apart((report,), (Path(base), Path(tuned), Path(tuned).with_suffix(".json"), *given, *beside), out)
        from fisherkit.checkpoint.atomic import write_json
        from fisherkit.methods.merge import merge as methods

        made = methods.merge(
            base,
            tuned,
            out,
            options,
            command=typed(),
            track=console.tracker("merge", quiet=quiet),
            say=sayer(quiet),
        )
        if report is not None:
            write_json(report, made.as_json())
        console.say_kept(made.totals, selects=False, quiet=quiet)
        typer.echo(json.dumps(made.as_json(), indent=1) if as_json else str(out))

    run(command, debug=debug, hint=hint(out))
