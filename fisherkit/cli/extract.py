"""``fisherkit extract``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fisherkit.cli import console
from fisherkit.cli.app import MACHINE, OUTPUT, Command, Debug, Force, Json, Quiet, Resume, app, run, sayer
from fisherkit.options import ExtractOptions, parse_bytes, parse_json, parse_layers
from fisherkit.options import extract as choices
from fisherkit.options.part import parse_part

PROMPTS, MEASURE = "What is read", "What is measured"


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
        Path, typer.Option("--out", "-o", help=".pt, .safetensors, or no suffix for a folder.", rich_help_panel=OUTPUT)
    ] = Path("fisher.pt"),
    field: Annotated[
        str | None,
        typer.Option(
            help="Column with the prompt, or prompt=..,context=..,completion=..; found by itself otherwise.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Use the first so many rows; 0 for all.", rich_help_panel=PROMPTS)] = 200,
    max_length: Annotated[
        int, typer.Option(help="Tokens per sample; longer ones are cut on the right.", rich_help_panel=PROMPTS)
    ] = 256,
    chat_template: Annotated[
        choices.ChatTemplate,
        typer.Option(help="Use the tokenizer's; auto: when it has one.", rich_help_panel=PROMPTS),
    ] = "auto",
    chat_template_kwargs: Annotated[
        str, typer.Option(help="JSON passed to the template.", rich_help_panel=PROMPTS)
    ] = "{}",
    loss: Annotated[
        choices.Loss,
        typer.Option(
            help="Tokens that count: all, the answer (completion), all its turns (assistant); auto is completion "
            "where the set has answers, else all.",
            rich_help_panel=PROMPTS,
        ),
    ] = "auto",
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
            "for mask --basis activation.",
            rich_help_panel=MEASURE,
        ),
    ] = "fisher",
    seed: Annotated[int, typer.Option(help="Of sampled labels.", rich_help_panel=MEASURE)] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Measure one of N parts of the samples, such as 3/16; combine adds the parts.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Layers in memory at a time; lowered if they do not fit.", rich_help_panel=MACHINE)
    ] = 8,
    batch_tokens: Annotated[
        int, typer.Option(help="Padded tokens per batch; never changes the result.", rich_help_panel=MACHINE)
    ] = 1024,
    dtype: Annotated[
        choices.DType,
        typer.Option(
            help="What is computed in; auto is the checkpoint's own, or float32 on a CPU far faster in that.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.", rich_help_panel=MACHINE)] = "auto",
    engine: Annotated[
        choices.Engine,
        typer.Option(help="stream: group by group; resident: the whole model in memory.", rich_help_panel=MACHINE),
    ] = "auto",
    resume: Resume = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run Python code that ships with the model.", rich_help_panel="Danger"
        ),
    ] = False,
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
            field=field,
            limit=limit,
            max_length=max_length,
            chat_template=chat_template,
            chat_template_kwargs=parse_json("chat-template-kwargs", chat_template_kwargs),
            loss=loss,
            targets=targets,
            layers=parse_layers(layers) if layers is not None else None,
            labels=labels,
            reduction=reduction,
            statistics=statistics,
            seed=seed,
            shard=parse_part("shard", shard) if shard is not None else None,
            group_size=group_size,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
            engine=engine,
            resume=resume,
            trust_remote_code=trust_remote_code,
            store=store,
            shard_bytes=parse_bytes("max-shard-size", max_shard_size),
            force=force,
        )
        say = sayer(quiet)
        track = console.tracker("extract", quiet=quiet, begin="loading torch and transformers")
        from fisherkit.methods.extract import measure

        source = prompts or ["builtin"]
        if dry_run:
            console.show_facts(measure.plan_extract(model, source, options, say=say), as_json=as_json)
            return
        report = measure.extract(model, source, out, options, track=track, say=say)
        typer.echo(json.dumps(_plain(report), indent=1) if as_json else str(report.path))

    run(command, debug=debug, hint=f"What is finished is in {out}.partial; --resume goes on with it.")


def _plain(report: Any) -> dict[str, Any]:
    fields = asdict(report)
    return fields | {"path": str(report.path), "files": [str(file) for file in report.files]}
