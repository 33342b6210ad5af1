"""Words that several messages about prompts share; what a user's file brings into them is kept short."""

from collections.abc import Iterable, Mapping
from typing import Any

_TYPE_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}


def counted(number: int, noun: str) -> str:
    """``(1, "row")`` -> ``"1 row"``, ``(1234, "row")`` -> ``"1,234 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clipped(text: str, length: int) -> str:
    """Return text as one line of at most ``length`` characters, with dots for what was left out."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 3] + "..."


def type_name(value: Any) -> str:
    """Name the type of a JSON value for a person: ``null``, ``a number``, ``a dict``."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def names_of(row: Iterable[Any]) -> str:
    """List the columns of a row."""
    return clipped(", ".join(map(str, row)), 100) or "nothing"


def reasons_of(skipped: Mapping[str, int]) -> str:
    """``{"empty": 3}`` -> ``"3 empty"``; the most frequent reasons first."""
    ordered = sorted(skipped.items(), key=lambda item: -item[1])
    return clipped(", ".join(f"{number:,} {reason}" for reason, number in ordered), 140)
