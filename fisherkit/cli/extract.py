"""``fisherkit extract``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fisherkit.cli import console
from fisherkit.cli.app import MACHINE, OUTPUT, Command, Debug, Force, Json, Quiet, Resume, app, run, sayer
from fisherkit.cli.run_options import (
    BatchTokens,
    ChatTemplate,
    ChatTemplateKwargs,
    Device,
    DType,
    Engine,
    Field,
    GroupSize,
    Limit,
    Loss,
    MaxLength,
    TrustRemoteCode,
    run_options,
)
from fisherkit.errors import OptionError
from fisherkit.options import ExtractOptions, parse_bytes, parse_layers, parse_rate
from fisherkit.options import extract as choices
from fisherkit.options.part import parse_part

MEASURE = "What is measured"


@app.command(cls=Command)
def extract(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint: folder, file, org/name or org/name@revision.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPTS",
            help="Files (txt, jsonl, json, csv, tsv, parquet; .gz and .zst too), folders, a hub data set, - for stdin, "
            "or builtin.",
            show_default="builtin",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help=".pt, .safetensors, or no suffix for a folder; of inputs .safetensors.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("fisher.pt"),
    field: Field = None,
    limit: Limit = 200,
    max_length: MaxLength = 256,
    chat_template: ChatTemplate = "auto",
    chat_template_kwargs: ChatTemplateKwargs = "{}",
    loss: Loss = "auto",
    targets: Annotated[
        str,
        typer.Option(
            help="matrices (of the blocks), all (norms, biases, embeddings, head too), or a regular expression on "
            "tensor names.",
            rich_help_panel=MEASURE,
        ),
    ] = "matrices",
    layers: Annotated[str | None, typer.Option(help="Only these, such as 0-7,12.", rich_help_panel=MEASURE)] = None,
    labels: Annotated[
        choices.Labels,
        typer.Option(help="The data's (empirical Fisher), or the model's own (true Fisher).", rich_help_panel=MEASURE),
    ] = "data",
    reduction: Annotated[
        choices.Reduction,
        typer.Option(help="A sample's loss is this over its tokens.", rich_help_panel=MEASURE),
    ] = "mean",
    statistics: Annotated[
        choices.Statistics,
        typer.Option(
            help="activations: beside the Fisher, E\\[x x^T] of every matrix's inputs and of its output gradients, "
            "for mask --basis activation. inputs: those of inputs alone, by one forward, for merge --regmean.",
            rich_help_panel=MEASURE,
        ),
    ] = "fisher",
    rank: Annotated[
        int | None,
        typer.Option(help="Of inputs: keep a factor of so many columns of each.", rich_help_panel=MEASURE),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampled labels.", rich_help_panel=MEASURE)] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Measure one of N parts of the samples, such as 3/16; combine adds the parts.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    group_size: GroupSize = 8,
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    engine: Engine = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Plan with so much, such as 80GB; what is free otherwise. With --dry-run, that of another machine.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="The same for an accelerator's own.", rich_help_panel=MACHINE)
    ] = None,
    resume: Resume = False,
    trust_remote_code: TrustRemoteCode = False,
    store: Annotated[
        choices.Store,
        typer.Option(help="Of the file; auto is bf16, and fp32 with --shard.", rich_help_panel=OUTPUT),
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(help="Largest shard of a folder, such as 5GB.", rich_help_panel=OUTPUT)
    ] = "5GB",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done; needs just the config.", rich_help_panel=OUTPUT),
    ] = False,
    flops: Annotated[
        str | None,
        typer.Option(
            help="Of --dry-run: operations per second to reckon the time with, such as 400T; this CPU's otherwise.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the diagonal Fisher of a model on a prompt set.

    Example: fisherkit extract Qwen/Qwen3-0.6B prompts.jsonl -o fisher.pt
    """

    def command() -> None:
        options = ExtractOptions(
            targets=targets,
            layers=parse_layers(layers) if layers is not None else None,
            labels=labels,
            reduction=reduction,
            statistics=statistics,
            rank=rank,
            seed=seed,
            shard=parse_part("shard", shard) if shard is not None else None,
            memory=parse_bytes("memory", memory) if memory is not None else None,
            device_memory=parse_bytes("device-memory", device_memory) if device_memory is not None else None,
            store=store,
            shard_bytes=parse_bytes("max-shard-size", max_shard_size),
            **run_options(
                field=field,
                limit=limit,
                max_length=max_length,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
                loss=loss,
                group_size=group_size,
                batch_tokens=batch_tokens,
                dtype=dtype,
                device=device,
                engine=engine,
                resume=resume,
                trust_remote_code=trust_remote_code,
                force=force,
            ),
        )
        rate = parse_rate("flops", flops) if flops is not None else None
        if rate is not None and not dry_run:
            raise OptionError("--flops goes with --dry-run, which tells the time")
        say = sayer(quiet)
        track = console.tracker("extract", quiet=quiet, begin="loading torch and transformers")
        source = prompts or ["builtin"]
        if dry_run:
            from fisherkit.methods.extract.dry_run import plan_extract

            console.show_facts(plan_extract(model, source, options, flops=rate, say=say), as_json=as_json)
            return
        from fisherkit.methods.extract import measure

        report = measure.extract(model, source, out, options, distributed=True, track=track, say=say)
        typer.echo(json.dumps(_plain(report), indent=1) if as_json else str(report.path))

    run(command, debug=debug, hint=f"What is finished is in {out}.partial; --resume goes on with it.")


def _plain(report: Any) -> dict[str, Any]:
    fields = asdict(report)
    return fields | {"path": str(report.path), "files": [str(file) for file in report.files]}
