"""``fisherkit combine``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli import console
from fisherkit.cli.app import OUTPUT, Command, Debug, Force, Json, Quiet, Resume, app, run, sayer
from fisherkit.options import parse_bytes
from fisherkit.options.checks import parse_weights
from fisherkit.options.combine import CombineOptions
from fisherkit.options.extract import Store


@app.command(cls=Command)
def combine(
    parts: Annotated[
        list[Path], typer.Argument(metavar="FISHER...", help="All parts that extract --shard wrote, in any order.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help=".pt, .safetensors, or no suffix for a folder.", rich_help_panel=OUTPUT)
    ] = Path("fisher.pt"),
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W",
            help="Add Fishers of several prompt sets, each by its weight, such as 1,3.",
        ),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Go on where parts are missing; which ones is said.")
    ] = False,
    resume: Resume = False,
    store: Annotated[Store, typer.Option(help="Of the file; auto is bf16.", rich_help_panel=OUTPUT)] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(help="Largest shard of a folder, such as 5GB.", rich_help_panel=OUTPUT)
    ] = "5GB",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Add the parts of a Fisher that several runs of extract --shard measured.

    Example: fisherkit combine part-*.safetensors -o fisher.pt
    """

    def command() -> None:
        options = CombineOptions(
            weights=parse_weights(weights) if weights is not None else None,
            partial=partial,
            store=store,
            shard_bytes=parse_bytes("max-shard-size", max_shard_size),
            resume=resume,
            force=force,
        )
        from fisherkit.methods.combine.combine import combine as add

        report = add(parts, out, options, track=console.tracker("combine", quiet=quiet), say=sayer(quiet))
        plain = asdict(report) | {"path": str(report.path), "files": [str(file) for file in report.files]}
        typer.echo(json.dumps(plain, indent=1) if as_json else str(report.path))

    run(command, debug=debug, hint=f"What is finished is in {out}.partial; --resume goes on with it.")
