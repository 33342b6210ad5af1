"""One of several parts of a job, as ``--shard 3/16`` names it."""

import re
from typing import NamedTuple

from fisherkit.errors import OptionError

_MOST = 1_000_000


class Part(NamedTuple):
    """The ``number``-th of ``of`` equal parts, from 1; written ``3/16``."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parse_part(option: str, text: str) -> Part:
    """Parse ``"3/16"``.

    Args:
        option: for the message.
        text: as it was typed.

    Raises:
        OptionError: neither of this form, nor from 1/N to N/N.
    """
    match = re.fullmatch(r"\s*(\d{1,7})\s*/\s*(\d{1,7})\s*", text)
    if match is None:
        raise OptionError(f"--{option} takes a part such as 3/16, the third of sixteen, not {text[:40]!r}")
    return check_part(option, (int(match[1]), int(match[2])))


def check_part(option: str, part: tuple[int, int]) -> Part:
    """Return a pair of numbers as a Part.

    Raises:
        OptionError: not from (1, N) to (N, N).
    """
    number, of = part
    if type(number) is not int or type(of) is not int or not 1 <= number <= of <= _MOST:
        raise OptionError(f"--{option} {number}/{of}: parts count from 1 to their number, such as 1/16 to 16/16")
    return Part(number, of)
