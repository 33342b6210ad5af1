"""Options that ``fapm`` and ``merge`` share."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from fisherkit.cli.app import MACHINE, OUTPUT
from fisherkit.options import merge as choices
from fisherkit.options import parse_bytes
from fisherkit.options.part import parse_part

WHICH = "Which tensors"

Base = Annotated[
    str,
    typer.Argument(metavar="BASE", help="The model that was fine-tuned: folder, file, org/name or org/name@revision."),
]
Tuned = Annotated[
    str, typer.Argument(metavar="FT", help="What was made of it: a checkpoint, a PEFT adapter, or a sparse delta.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(help="Only tensors whose name matches this regular expression, or matrices.", rich_help_panel=WHICH),
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Leave out tensors whose name matches this.", rich_help_panel=WHICH)
]
Rest = Annotated[choices.Rest, typer.Option(help="Whose the tensors left out are.", rich_help_panel=WHICH)]
Nan = Annotated[choices.OnNan, typer.Option(help="What is done about NaN and infinities.", rich_help_panel=WHICH)]
Seed = Annotated[int, typer.Option(help="Of what is random.", rich_help_panel=MACHINE)]
ShardSize = Annotated[
    str | None,
    typer.Option("--max-shard-size", help="Bytes, such as 5GB; shards like BASE's otherwise.", rich_help_panel=OUTPUT),
]
Report = Annotated[Path | None, typer.Option(help="Write figures per tensor, .json.", rich_help_panel=OUTPUT)]


Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Write one of N shares of OUT's files, such as 3/16; the last process puts OUT together.",
        rich_help_panel=MACHINE,
    ),
]


def pair_options(
    *,
    only: list[str] | None,
    skip: list[str] | None,
    rest: choices.Rest,
    nan: choices.OnNan,
    max_shard_size: str | None,
    resume: bool,
    force: bool,
    shard: str | None,
) -> dict[str, Any]:
    """Return what both commands take as keywords of PairOptions, from which their own options derive."""
    return {
        "only": tuple(only or ()),
        "skip": tuple(skip or ()),
        "rest": rest,
        "nan": nan,
        "shard_bytes": parse_bytes("max-shard-size", max_shard_size) if max_shard_size is not None else None,
        "resume": resume,
        "force": force,
        "shard": parse_part("shard", shard) if shard is not None else None,
    }


class _Made(Protocol):
    """A report of what was made."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Shares of the output that other processes have still to write."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""


def report_beside(report: Path | None) -> dict[Path, Callable[[_Made], bytes]]:
    """Return what makes the file of figures per tensor from a report, by its path; empty where none is asked for."""
    from fisherkit.checkpoint.atomic import json_text

    return {report: lambda made: json_text(report, made.as_json()).encode()} if report is not None else {}


def show_made(made: _Made, path: Path | None, *, as_json: bool) -> None:
    """Print the path of what was made on stdout, or the whole report as JSON; nothing while shares are missing."""
    if made.missing and not as_json:
        return
    typer.echo(json.dumps(made.as_json(), indent=1) if as_json else str(path))


def hint(out: Path | None) -> str:
    """Return what a person who interrupted the command should know."""
    return f"What is finished is in {out}.partial; --resume goes on with it." if out is not None else ""


def typed() -> list[str]:
    """Return the command line for the model card: as it was typed, but for what makes no other output of it."""
    words = sys.argv[1:]
    kept = [word for word, before in zip(words, ["", *words], strict=False) if "--shard" not in (word, before)]
    return ["fisherkit", *(word for word in kept if word not in ("--resume", "--force") and "--shard=" not in word)]
