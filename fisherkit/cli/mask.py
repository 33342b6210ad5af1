"""``fisherkit mask``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli import console
from fisherkit.cli.app import MACHINE, OUTPUT, Command, Debug, Force, Json, Quiet, app, run, sayer
from fisherkit.options import MaskOptions
from fisherkit.options import mask as choices
from fisherkit.options.merge import Scope, Side

WHICH, SCORES, SUBSPACE = "Which entries may change", "What is ranked", "Protected directions instead"


@app.command(cls=Command)
def mask(
    fisher: Annotated[
        Path, typer.Argument(metavar="FISHER", help="A Fisher that extract wrote: .safetensors, a folder, or .pt.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .safetensors file; a .json goes beside it.", rich_help_panel=OUTPUT)
    ] = Path("mask.safetensors"),
    train: Annotated[
        choices.Top | None,
        typer.Option(help="What ranks highest may change, all else is frozen (new task).", rich_help_panel=WHICH),
    ] = None,
    protect: Annotated[
        choices.Top | None,
        typer.Option(help="What ranks highest is frozen, all else may change (old ability).", rich_help_panel=WHICH),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share that is the top; 0.3 unless a preset says.", rich_help_panel=WHICH)
    ] = None,
    aggregate: Annotated[
        choices.Aggregate | None,
        typer.Option(
            help="Rank output rows by scores combined over their input, columns by those over their output, or entries "
            "(none); input unless a preset says.",
            rich_help_panel=WHICH,
        ),
    ] = None,
    combine: Annotated[
        choices.Combine | None, typer.Option(help="How scores are combined; sum by default.", rich_help_panel=WHICH)
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(help="Take the top of every tensor (default), every layer, or all.", rich_help_panel=WHICH),
    ] = None,
    preset: Annotated[
        choices.Preset | None,
        typer.Option(
            help="fggm (rows, 0.3 of every tensor, train), fish (entries, 0.005 global, train), ssu (columns, 0.5 of "
            "every tensor, protect), shield (a soft subspace: activation, energy 0.99, pull 5); other options win.",
            rich_help_panel=WHICH,
        ),
    ] = None,
    score: Annotated[
        choices.MaskScore,
        typer.Option(
            help="magnitude is |W|, fisher-weight F W^2, gallop sqrt F / |W|; random is the control.",
            rich_help_panel=SCORES,
        ),
    ] = "fisher",
    weights: Annotated[
        str | None, typer.Option(help="The model, for what looks at its weights.", rich_help_panel=SCORES)
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A second Fisher: rank by how far the first exceeds it.", rich_help_panel=SCORES)
    ] = None,
    contrast: Annotated[
        choices.Contrast | None,
        typer.Option(help="How: ratio by default; each Fisher by its own mean.", rich_help_panel=SCORES),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random scores.", rich_help_panel=SCORES)] = 0,
    svd_rank: Annotated[
        int | None, typer.Option(help="Protect so many singular modes per matrix.", rich_help_panel=SUBSPACE)
    ] = None,
    svd_energy: Annotated[
        float | None,
        typer.Option(help="Protect as many as hold this share of the sum of squares.", rich_help_panel=SUBSPACE),
    ] = None,
    pull: Annotated[
        float | None,
        typer.Option(
            help="Soft: a course of training draws updates back out of the directions, this hard; activation only.",
            rich_help_panel=SUBSPACE,
        ),
    ] = None,
    basis: Annotated[
        choices.Basis | None,
        typer.Option(
            help="Modes of the Fisher (default), its root, the weight, sqrt F W (fisher-weight), FT - W (delta), "
            "what goes into each layer (activation), or that and the gradients at what comes out (kron).",
            rich_help_panel=SUBSPACE,
        ),
    ] = None,
    delta: Annotated[
        str | None, typer.Option(help="The fine-tune, for --basis delta.", rich_help_panel=SUBSPACE)
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(
            help="For these two: from extract --statistics activations; found beside FISHER otherwise.",
            rich_help_panel=SUBSPACE,
        ),
    ] = None,
    side: Annotated[
        Side | None,
        typer.Option(
            help="Store modes of outputs (left), inputs (right; what activation has), or both (default).",
            rich_help_panel=SUBSPACE,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="For subspaces: auto, cpu, cuda, cuda:N.", rich_help_panel=MACHINE)
    ] = "auto",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn a Fisher into a mask of weights that may change, or into directions to protect.

    Example: fisherkit mask fisher.pt --keep 0.3 --train top -o mask.safetensors
    """

    def command() -> None:
        options = MaskOptions(
            train=train,
            protect=protect,
            keep=keep,
            aggregate=aggregate,
            combine=combine,
            scope=scope,
            preset=preset,
            score=score,
            weights=weights,
            against=against,
            contrast=contrast,
            seed=seed,
            svd_rank=svd_rank,
            svd_energy=svd_energy,
            pull=pull,
            basis=basis,
            delta=delta,
            activations=activations,
            side=side,
            device=device,
            force=force,
        )
        from fisherkit.methods.mask import build

        report = build.mask(fisher, out, options, track=console.tracker("mask", quiet=quiet), say=sayer(quiet))
        typer.echo(json.dumps(report.as_json(), indent=1) if as_json else str(report.path))

    run(command, debug=debug)
