"""``fisherkit score``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisherkit.cli import console
from fisherkit.cli.app import OUTPUT, Command, Debug, Force, Json, Quiet, Resume, app, run, sayer
from fisherkit.cli.run_options import (
    PROMPTS,
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
    named_prompts,
    run_options,
)
from fisherkit.errors import OptionError
from fisherkit.options import ScoreOptions

if TYPE_CHECKING:
    from fisherkit.methods.score.report import ScoreReport


@app.command(cls=Command)
def score(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoints: folder, file, org/name or org/name@revision; PEFT adapters; sparse deltas. "
            "The first is what the others are compared with.",
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="A prompt set and what to call it, such as old=general.jsonl; several times for several sets.",
            show_default="builtin",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="What adapters and sparse deltas are put on; the first whole MODEL otherwise.", rich_help_panel=PROMPTS
        ),
    ] = None,
    field: Field = None,
    limit: Limit = 200,
    max_length: MaxLength = 256,
    chat_template: ChatTemplate = "auto",
    chat_template_kwargs: ChatTemplateKwargs = "{}",
    loss: Loss = "auto",
    window: Annotated[
        int | None,
        typer.Option(
            help="Cut plain text into windows of so many tokens; --limit counts them.", rich_help_panel=PROMPTS
        ),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Column with the choices of questions; the one of lowest loss is the answer.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    by_bytes: Annotated[
        bool,
        typer.Option("--by-bytes", help="Compare bits per byte, across different tokenizers.", rich_help_panel=PROMPTS),
    ] = False,
    group_size: GroupSize = 8,
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    engine: Engine = "auto",
    resume: Resume = False,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Draw a picture: .html, .svg or .png.", rich_help_panel=OUTPUT)
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Write a row per sample and checkpoint, .jsonl; for inspect.", rich_help_panel=OUTPUT),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what checkpoints lose on prompts: did it forget, did it learn, and did this fix it?

    Example: fisherkit score org/base my-fine-tune --prompts old=general.jsonl --prompts new=task.jsonl
    """
    work = None if samples is None and out is None else Path(f"{samples if samples is not None else out}.partial")

    def command() -> None:
        options = ScoreOptions(
            window=window,
            choices=choices,
            by_bytes=by_bytes,
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
        if resume and work is None:
            raise OptionError("--resume goes on from the folder beside an output; give --samples or --out")
        if out is not None:
            from fisherkit.render.files import check_figure

            check_figure(out, force=True)  # the run itself knows what a killed one has put there
        track = console.tracker("score", quiet=quiet, begin="loading torch and transformers")
        from fisherkit.methods.score.score import score as measure

        report = measure(
            models,
            named_prompts(prompts or ["builtin"]),
            options,
            base=base,
            samples=samples,
            beside=_picture(out),
            work=work,
            track=track,
            say=sayer(quiet),
        )
        for path in (samples, out):
            if path is not None:
                sayer(quiet)(f"{path}: written")
        if as_json:
            typer.echo(json.dumps(report.as_json(), indent=1, allow_nan=False))
        else:
            console.show_score(report)

    hint = "" if work is None else f"What is finished is in {work}; --resume goes on with it."
    run(command, debug=debug, hint=hint)


def _picture(out: Path | None) -> "dict[Path, Callable[[ScoreReport], bytes]]":
    """Return what makes the picture from a report, by its path; empty where none is asked for."""
    if out is None:
        return {}
    from fisherkit.render.files import score_bytes

    return {out: lambda report: score_bytes(report, out.suffix.lower())}
