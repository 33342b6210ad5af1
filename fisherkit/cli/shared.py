"""Options that ``fapm`` and ``merge`` share."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli.app import MACHINE, OUTPUT
from fisherkit.options import parse_bytes

WHICH = "Which tensors"

Base = Annotated[
    str, typer.Argument(help="The model that was fine-tuned: folder, file, org/name or org/name@revision.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(help="Only tensors whose name matches this regular expression, or matrices.", rich_help_panel=WHICH),
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Leave out tensors whose name matches this.", rich_help_panel=WHICH)
]
Rest = Annotated[str, typer.Option(help="Tensors left out are FT's (tuned) or BASE's (base).", rich_help_panel=WHICH)]
Nan = Annotated[str, typer.Option(help="NaN and infinities: refuse, or keep-base.", rich_help_panel=WHICH)]
Seed = Annotated[int, typer.Option(help="Of what is random.", rich_help_panel=MACHINE)]
ShardSize = Annotated[
    str | None,
    typer.Option("--max-shard-size", help="Bytes, such as 5GB; shards like BASE's otherwise.", rich_help_panel=OUTPUT),
]


def shard_bytes(text: str | None) -> int | None:
    """The option as a number of bytes."""
    return parse_bytes("max-shard-size", text) if text is not None else None


def hint(out: Path | None) -> str:
    """What to say to a person who interrupted the command."""
    return f"What is finished is in {out}.partial; --resume goes on with it." if out is not None else ""


def typed() -> list[str]:
    """The command line for the model card: as it was typed, but for what makes no other output of it."""
    return ["fisherkit", *(word for word in sys.argv[1:] if word not in ("--resume", "--force"))]
