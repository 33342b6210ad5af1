"""Budgets: how far a prompt set may fall behind the first checkpoint, in nats per token or in exact matches."""

import math
import re
from dataclasses import dataclass

from fisherkit.errors import OptionError

_FORM = "takes NAME:+NATS or NAME:-PERCENT%, such as old:+0.02 or old:-1%"


@dataclass(frozen=True)
class Budget:
    """Bound for one prompt set.

    Attributes:
        name: of the set.
        change: of the loss in nats per token, at most; or of exact matches, at least, as a share: -0.01 lets one answer
            in a hundred go.
        is_exact: the second.
    """

    name: str
    change: float
    is_exact: bool = False

    def __str__(self) -> str:
        return f"{self.name}:-{100 * abs(self.change):g}%" if self.is_exact else f"{self.name}:{self.change:+g}"


def parse_budget(text: str) -> Budget:
    """Parse a budget: ``old:+0.02`` lets the loss on ``old`` rise by 0.02 nats, ``old:-1%`` one exact match in 100 go.

    Raises:
        OptionError: it is neither.
    """
    name, _, bound = text.rpartition(":")
    match = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%?)\s*", bound, re.IGNORECASE)
    if not name or match is None or not math.isfinite(float(match[1])):
        raise OptionError(f"--budget {_FORM}, not {text!r}")
    value, is_exact = float(match[1]), bool(match[2])
    number = match[1].lstrip("+-")
    if is_exact and not match[1].startswith("-"):
        raise OptionError(f"--budget {text!r}: say -{number}% for exact matches that may go, or +{number} without %")
    if not is_exact and value < 0:
        raise OptionError(
            f"--budget {text!r}: a budget is what may be lost; say +{number} for nats that the loss may rise by, or "
            f"-{number}% for exact matches that may go"
        )
    return Budget(name, value / 100 if is_exact else value, is_exact)
