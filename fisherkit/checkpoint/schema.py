"""Validator of the JSON files that fisherkit defines: rules for values, put together to a table per format.

A rule is a function that takes a value and where it lies, and raises MisfitError where the value breaks it. Keys that a
table does not name pass: a later version may add some. Standard library only.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.headers import MAX_HEADER_BYTES, file_size, fits_memory, parse_any, read_start
from fisherkit.errors import CheckpointError

Rule = Callable[[Any, str], None]

_MAX_SIZE = 2**63 - 1


class MisfitError(ValueError):
    """A value that breaks a rule; the message says where it lies, what it is and what it should be."""


def read_object(path: Path, what: str, rule: Rule, remedy: str) -> dict[str, Any]:
    """Read a JSON file whose content fits a rule.

    Args:
        path: the file.
        what: what it should describe, such as ``a mask``.
        rule: for the whole of it.
        remedy: what a person can do about a file that does not fit, as the end of a sentence.

    Raises:
        CheckpointError: missing, unreadable, no JSON object, too large, or not what the rule says.
    """
    content = parse_file(path, f"the description of {what}")
    check(path, content, what, rule, remedy)
    return dict(content)


def check(path: Path, content: Any, what: str, rule: Rule, remedy: str) -> None:
    """Raise CheckpointError where the content of a file breaks a rule; the arguments are those of read_object."""
    try:
        rule(content, "")
    except MisfitError as error:
        raise CheckpointError(f"{path}: does not describe {what}: {error}; {remedy}") from None


def parse_file(path: Path, what: str) -> Any:
    """Read the JSON value in a file; nothing is known of its content.

    Raises:
        CheckpointError: missing, unreadable, too large, or no JSON.
    """
    size = file_size(path)
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: {size} bytes are absurd for {what}")
    return parse_any(path, read_start(path, size), what)


def read_beside(path: Path) -> dict[str, Any] | None:
    """Read the JSON object in a file that may be anybody's; None where there is none, or something else in it.

    Raises:
        CheckpointError: it cannot be read, or is no JSON: who knows whose it was.
    """
    if not path.is_file() or file_size(path) > MAX_HEADER_BYTES:
        return None
    content = parse_file(path, "the JSON beside the tensors")
    return content if isinstance(content, dict) else None


# Rules for one value


def text(*words: str) -> Rule:
    """Return the rule for a string; one of ``words`` where some are given."""
    return _plain(lambda value: isinstance(value, str) and (not words or value in words), " or ".join(words) or "text")


def flag(value: Any, where: str) -> None:
    """Rule for true or false."""
    _plain(lambda value: isinstance(value, bool), "true or false")(value, where)


def whole(low: int = 0, high: int = _MAX_SIZE) -> Rule:
    """Return the rule for a whole number from ``low`` to ``high``; true and false are none."""
    return _plain(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")


def number(low: float = -math.inf, high: float = math.inf) -> Rule:
    """Return the rule for a finite number from ``low`` to ``high``, small enough for a float."""
    return _plain(lambda value: _finite(value) and low <= value <= high, f"a finite number from {low:g} to {high:g}")


def shape(value: Any, where: str) -> None:
    """Rule for the sizes of a tensor that can be held, see headers.fits_memory."""
    _plain(fits_memory, "a list of sizes that a tensor can have")(value, where)


def anything(value: Any, where: str) -> None:
    """Rule that every value fits."""


# Rules for several


def maybe(rule: Rule) -> Rule:
    """Return the rule for null, or a value that fits ``rule``."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            rule(value, where)

    return check


def listed(rule: Rule, least: int = 0) -> Rule:
    """Return the rule for a list of at least so many values that each fit ``rule``."""

    def check(value: Any, where: str) -> None:
        _plain(lambda value: isinstance(value, list) and len(value) >= least, "a list")(value, where)
        for number, one in enumerate(value):
            rule(one, f"{where}[{number}]")

    return check


def named(rule: Rule) -> Rule:
    """Return the rule for an object whose values, whatever their names, each fit ``rule``."""

    def check(value: Any, where: str) -> None:
        _plain(lambda value: isinstance(value, dict), "an object")(value, where)
        for name, one in value.items():
            rule(one, f"{where}.{name}".lstrip("."))

    return check


def table(required: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None) -> Rule:
    """Return the rule for an object with these keys.

    Args:
        required: keys that must be there, and the rule for each value.
        optional: keys that may be missing.
    """
    known = {**required, **(optional or {})}

    def check(value: Any, where: str) -> None:
        _plain(lambda value: isinstance(value, dict), "an object")(value, where)
        missing = next((key for key in required if key not in value), None)
        if missing is not None:
            raise MisfitError(f"{where or 'it'} lacks {missing!r}")
        for key, rule in known.items():
            if key in value:
                rule(value[key], f"{where}.{key}".lstrip("."))

    return check


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond float
        return False


def _plain(fits: Callable[[Any], bool], wanted: str) -> Rule:
    def check(value: Any, where: str) -> None:
        if not fits(value):
            found = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
            raise MisfitError(f"{where or 'it'} is {found[:60]}, not {wanted}")

    return check
