"""``fisherkit inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli import console
from fisherkit.cli.app import Command, Debug, Force, Json, Quiet, app, run
from fisherkit.errors import OptionError
from fisherkit.options.inspect import By, Form


@app.command(cls=Command)
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A Fisher, mask, checkpoint (or org/name), layer_importance.json, or samples of score."
        ),
    ],
    other: Annotated[Path | None, typer.Argument(metavar="OTHER", help="A second one, to compare.")] = None,
    by: Annotated[By, typer.Option(help="A row for each of them.")] = "layer",
    sort: Annotated[str | None, typer.Option(help="Column, largest first; -COLUMN smallest first.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every layer in the table, where many fold into groups.")
    ] = False,
    form: Annotated[Form, typer.Option("--format", help="auto: a table on a terminal, tsv elsewhere.")] = "auto",
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
        from fisherkit.artefacts.score_samples import is_samples
        from fisherkit.methods.inspect import summary

        if is_samples(file):
            _samples(file, other, out, sort, top, "json" if as_json else form)
            return
        view = summary.inspect(file, other, by=by, track=console.tracker("inspect", quiet=quiet)).sorted(sort, top)
        if out is None:
            # Rows that were sorted or cut are no neighbours any more: they do not fold.
            console.show(view, "json" if as_json else form, every=every or sort is not None or top is not None)
            return
        from fisherkit.render import files

        files.write_figure(view, out, force=force)
        typer.echo(str(out))

    run(command, debug=debug)


def _samples(file: Path, other: Path | None, out: Path | None, sort: str | None, top: int | None, form: Form) -> None:
    """Show the worst samples of a score; on a terminal not all, unless asked for."""
    from fisherkit.methods.inspect.samples import worst_samples

    if other is not None or out is not None:
        raise OptionError(f"{file}: samples of score are shown as rows; --format csv > FILE keeps them")
    console.show_samples(worst_samples(file).sorted(sort, top), form, every=top is not None)
