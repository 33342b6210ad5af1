"""``fisherkit export``."""

from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli import console
from fisherkit.cli.app import OUTPUT, Command, Debug, Force, app, run
from fisherkit.options import ExportOptions
from fisherkit.options.mask import ExportTarget


@app.command(cls=Command)
def export(
    mask: Annotated[
        Path, typer.Argument(metavar="MASK", help="A mask, or a layer_importance.json where layers are enough.")
    ],
    to: Annotated[ExportTarget, typer.Option("--to", help="The tool that takes it.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a file; stdout otherwise.", rich_help_panel=OUTPUT)
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="axolotl: of the layer that may change most; others are scaled down.")
    ] = 1e-5,
    base: Annotated[
        str | None,
        typer.Option(help="The model, where the mask does not name it: mergekit's base, and how many layers it has."),
    ] = None,
    tuned: Annotated[str | None, typer.Option(help="mergekit: the fine-tune.")] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write what other tools can take of a mask: config for trainers and mergers, masks for peft's SHiRA.

    Example: fisherkit export mask.safetensors --to axolotl >> config.yaml
    """

    def command() -> None:
        from fisherkit.methods.export import configs as exports

        options = ExportOptions(to=to, learning_rate=learning_rate, base=base, tuned=tuned, force=force)
        if out is None:
            console.show_text(exports.export(mask, options))
            return
        typer.echo(str(exports.write_export(mask, out, options)))

    run(command, debug=debug)
