"""Checks of option values, which raise OptionError, and parsers of what is typed on the command line."""

import json
import numbers
import re
from collections.abc import Sequence
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from fisherkit.errors import OptionError


def one_of(option: str, value: str, kind: Any) -> None:
    """Check that a value is one of the words of a Literal."""
    if value not in get_args(kind):
        raise OptionError(not_a_choice(option, value, get_args(kind)))


def not_a_choice(option: str, given: str, choices: Sequence[str]) -> str:
    """Say in one line what an option takes, and which of the choices a typo was probably meant to be."""
    similar = get_close_matches(str(given), choices, n=1)
    guess = f"; did you mean {similar[0]}?" if similar else ""
    return f"--{option} must be one of {', '.join(choices)}, not {str(given)!r}{guess}"


def at_least(option: str, value: int | None, least: int) -> None:
    """Check that a value is not given, or not below ``least``."""
    if value is not None and value < least:
        raise OptionError(f"--{option} must be at least {least}, not {value}")


def as_typed(value: object) -> str:
    """Return a number as a person types it: ``1`` for 1.0."""
    return str(value).removesuffix(".0")


def as_paths(options: object, *names: str) -> None:
    """Turn strings in the named fields into paths, which everything else in the library takes too."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, str):
            object.__setattr__(options, name, Path(value))


def check_share(option: str, value: float | None) -> None:
    """Check that a share is not given, or lies from 0 to 1."""
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise OptionError(f"--{option} must lie between 0 and 1, not {as_typed(value)}")


def check_pull(pull: float) -> None:
    """Check that a pull lies above 0 and below a million."""
    if isinstance(pull, bool) or not (isinstance(pull, numbers.Real) and 0 < pull < 1e6):
        raise OptionError(f"--pull must lie above 0 and below 1000000, not {as_typed(pull)}")


def check_weights(weights: Sequence[float], typed: str | None = None) -> None:
    """Check that weights are numbers above 0 and no more than 1e12, and not none.

    Args:
        weights: what parts of a mean count.
        typed: as they were written.
    """
    if not (weights and all(0 < weight <= 1e12 for weight in weights)):
        shown = typed if typed is not None else ",".join(map(as_typed, weights))
        raise OptionError(f"--weights takes numbers above 0 such as 1,3, not {shown[:80]!r}")


def check_steps(steps: float | None) -> None:
    """Check that the length of a course is not given, or above 0 and finite."""
    if steps is not None and (
        isinstance(steps, bool) or not (isinstance(steps, numbers.Real) and 0 < steps < float("inf"))
    ):
        raise OptionError(f"steps must be a number above 0, not {steps!r}")


def check_device(device: str) -> None:
    """Check that a device is called as torch calls it, or auto."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?", device):
        raise OptionError(f"--device takes auto, cpu, cuda, cuda:N, xpu or mps, not {device!r}")


def check_patterns(option: str, patterns: tuple[str, ...]) -> None:
    """Check that regular expressions compile."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise OptionError(f"--{option} {pattern!r} is not a regular expression: {error}") from None


def exact_share(value: float) -> Fraction:
    """Return the fraction that a person means by a decimal: 0.9 is nine tenths, not the nearest binary number."""
    return Fraction(repr(value))


def parse_shares(option: str, text: str) -> tuple[float, ...]:
    """Parse shares: ``"0.5,0.9"`` is ``(0.5, 0.9)``. Raises OptionError for anything outside of 0 to 1."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--{option} takes numbers such as 0.5,0.9,0.95, not {text!r}") from None
    for value in values:
        check_share(option, value)
    return values


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Parse numbers: ``"0.3"`` is ``(0.3,)``, ``"0.1,0.3"`` both, each once. Raises OptionError for anything else."""
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise OptionError(f"--{option} takes a number, or several such as 0.1,0.3,0.5, not {text!r}") from None


def parse_weights(text: str) -> tuple[float, ...]:
    """Parse weights of a mean: ``"1,3"`` is ``(1, 3)``. Raises OptionError for anything but numbers above 0."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    check_weights(weights, text)
    return weights


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layer numbers: ``"0-7,12"`` is ``(0, 1, ..., 7, 12)``. Raises OptionError for anything else."""
    layers: set[int] = set()
    most = 10_000
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        # Python reads no number of more than 4,300 digits, so their count is looked at first.
        if match and any(len(digits) > 6 or int(digits) > most for digits in re.findall(r"\d+", part)):
            raise OptionError(f"--layers {part.strip()[:40]}: no model has more than {most:,} layers")
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise OptionError(f"--layers takes numbers and ranges such as 0-7,12; {part.strip()!r} is neither")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))


def parse_bytes(option: str, text: str) -> int:
    """Parse a size in bytes: ``"5GB"`` is 5 * 10**9, ``"5GiB"`` 5 * 2**30, ``"5"`` 5. Raises OptionError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise OptionError(f"--{option} takes bytes such as 5GB or 500MiB, not {text!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def parse_rate(option: str, text: str) -> float:
    """Parse operations per second: ``"400T"`` is 4e14. Raises OptionError otherwise."""
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([KMGTP]?)\s*", text, re.IGNORECASE)
    if match is None:
        raise OptionError(f"--{option} takes operations per second such as 400T or 1.2P, not {text!r}")
    rate = float(match[1]) * 1000.0 ** " KMGTP".index(match[2].upper() or " ")
    check_rate(option, rate)
    return rate


def check_rate(option: str, rate: float | None) -> None:
    """Check that a rate is not given, or above zero."""
    if rate is not None and not 0 < rate < float("inf"):
        raise OptionError(f"--{option} must be above 0, not {as_typed(rate)}")


def parse_json(option: str, text: str) -> dict[str, Any]:
    """Parse a JSON object given as an option. Raises OptionError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # the latter for lists in lists, thousands deep
        value = None
    if not isinstance(value, dict):
        raise OptionError(f"--{option} takes a JSON object such as '{{\"key\": false}}', not {text!r}")
    return value
