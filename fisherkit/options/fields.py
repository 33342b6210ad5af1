"""Columns of a prompt set as they are named on the command line, and other options of prompts that need a check."""

import json
import re

from fisherkit.errors import OptionError

_ROLES = ("prompt", "context", "system", "completion")
_EXAMPLE = "--field prompt=instruction,context=context,completion=response"


def parse_field(text: str) -> dict[str, str] | None:
    """Parse columns by what they hold: ``"prompt=a,completion=b"`` is ``{"prompt": "a", "completion": "b"}``.

    Returns:
        Columns by role in the order given; None for text without ``=``, which is the name of a single column.

    Raises:
        OptionError: a part that is not prompt, context, system or completion, one of them twice, or no prompt.
    """
    if "=" not in text:
        return None
    columns: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text):  # the name of a column may have commas in it
        role, _, column = (piece.strip() for piece in part.partition("="))
        if role not in _ROLES or role in columns or not column:
            raise OptionError(f"--field takes {', '.join(_ROLES)}, each once, as in {_EXAMPLE}; not {part[:60]!r}")
        columns[role] = column
    if "prompt" not in columns:
        raise OptionError(f"--field {text[:100]} names no prompt, as {_EXAMPLE} does")
    return columns


def check_json(option: str, value: object) -> None:
    """Check that JSON can hold a value: it goes into the files that tell where a result comes from."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"--{option} holds what JSON cannot: {str(error)[:120]}") from None
