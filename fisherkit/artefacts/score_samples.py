"""Samples of a score: JSON lines, a row per checkpoint and sample. Standard library only."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.headers import parse_any
from fisherkit.checkpoint.schema import check, flag, listed, maybe, number, table, text, whole
from fisherkit.errors import CheckpointError, OptionError

_LONGEST = 1 << 20  # bytes of a line that is looked at
_figure = maybe(number())
SCHEMA = table(
    {
        "checkpoint": text(),
        "set": text(),
        "row": whole(1),
        "tokens": whole(1),
        "loss": number(),
        "exact": flag,
        "accuracy": number(0, 1),
        "bits_per_byte": _figure,
        "difference": _figure,
        "kl": _figure,
        "agreement": _figure,
        "prompt": text(),
        "answer": text(),
    },
    {"right": whole(), "choice_losses": listed(number())},
)
"""A line; see checkpoint.schema."""


def check_samples(path: Path) -> None:
    """Refuse a name that is none of a file of samples; raises OptionError."""
    if path.suffix != ".jsonl":
        raise OptionError(f"{path}: samples go into a file that ends in .jsonl")


def samples_bytes(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as the content of a file."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    return "".join(lines).encode("utf-8", "backslashreplace")


def is_samples(path: Path) -> bool:
    """Return whether the first line of a file is a row as write_samples writes it, going by its columns."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            row = parse_any(path, file.readline(_LONGEST), "line 1")
    except (OSError, CheckpointError):
        return False
    return isinstance(row, dict) and {"checkpoint", "set", "row", "loss", "difference"} <= row.keys()


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file of samples.

    Raises:
        CheckpointError: it cannot be read, or a line is not what write_samples writes; the message names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for at, line in enumerate(lines, 1):
        row = parse_any(path, line, f"line {at}")
        check(path, row, f"a sample in line {at}", SCHEMA, "score again")
        rows.append(dict(row))
    return rows
