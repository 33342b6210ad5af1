"""``fisherkit inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli import console
from fisherkit.cli.app import Debug, Force, Json, Quiet, app, run


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A Fisher, mask, checkpoint, or layer_importance.json.")],
    other: Annotated[Path | None, typer.Argument(help="A second one, to compare.")] = None,
    by: Annotated[str, typer.Option(help="A row per layer, module or tensor.")] = "layer",
    sort: Annotated[str | None, typer.Option(help="Column, largest first; -COLUMN smallest first.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="auto (table on a terminal, else tsv), table, tsv, csv, json, jsonl.")
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a report: .html, .svg, .png, .csv or .json.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show where the Fisher information lies: per layer, module or tensor.

    Example: fisherkit inspect fisher.pt --by module --sort share | head -3
    """

    def command() -> None:
        from fisherkit.methods.inspect import summary

        found = summary.inspect(file, other, by=by, track=console.tracker("inspect", quiet=quiet))  # type: ignore[arg-type]
        found = found.sorted(sort, top)
        if out is None:
            console.show(found, "json" if as_json else form)
            return
        from fisherkit.render import files

        files.write_figure(found, out, force=force)
        typer.echo(str(out))

    run(command, debug=debug)
