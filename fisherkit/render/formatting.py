"""Colours, short numbers and short names that tables on the terminal and figures in files share.

Knows neither: text and numbers in, text and colours out. Standard library only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

RGB = tuple[int, int, int]

# Viridis, sampled at nine places: even steps look even, also to the colour-blind and in grey.
_VIRIDIS: tuple[RGB, ...] = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 74, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (109, 205, 89),
    (253, 231, 37),
)
# From one colour over light grey to another that the colour-blind tell from it; both ends are equally dark.
_DIVERGING: tuple[RGB, ...] = ((21, 90, 150), (110, 165, 205), (222, 222, 222), (232, 150, 85), (166, 60, 10))
_SUFFIXES = ("", "k", "M", "G", "T")


def colour(level: float) -> RGB:
    """Return the colour of a level from 0 to 1; what lies outside takes the nearest end."""
    return _between(_VIRIDIS, level)


def diverging(level: float) -> RGB:
    """Return the colour of a level from 0 to 1 whose middle means that nothing differs."""
    return _between(_DIVERGING, level)


def _between(palette: Sequence[RGB], level: float) -> RGB:
    place = min(max(level, 0.0), 1.0) * (len(palette) - 1)
    index = min(int(place), len(palette) - 2)
    low, high, part = palette[index], palette[index + 1], place - index
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def count(number: int) -> str:
    """Shorten a count: ``29286727680`` is ``29.3 G``; below a thousand in full."""
    size, step = float(number), 0
    while size >= 999.5 and step < len(_SUFFIXES) - 1:
        size, step = size / 1000, step + 1
    return f"{number}" if step == 0 else f"{size:.3g} {_SUFFIXES[step]}"


def number(value: float | int | str | None) -> str:
    """Return a figure in four digits; ``-`` for what is unknown."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        return f"{value:.3e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:#.4g}" if value else "0"
    return "-" if value is None else str(value)


def percent(share: float | None) -> str:
    """Return a share in percent: ``0.0123`` is ``1.23 %``; ``-`` for what is unknown."""
    if share is None:
        return "-"
    if 0 < share < 5e-5:
        return "<0.01 %"
    return f"{100 * share:.1f} %" if share >= 0.09995 else f"{100 * share:.2f} %"


def printable(text: str) -> str:
    """Return the text with everything that a terminal might obey, such as escapes and line ends, spelled out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """Return the shortest endings of dotted names that tell them apart; ``self_attn.q_proj`` is ``q``."""
    short: dict[str, str] = {}
    for module in modules:
        parts = module.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in modules) == 1)
        short[module] = next(alone, module)
    bare = {module: end.removesuffix("_proj") for module, end in short.items()}
    return bare if len(set(bare.values())) == len(bare) else short


def provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flatten provenance to ``(field, text)`` pairs: ``("prompts.rows", "200")``; what is null is left out."""
    rows = []
    for field, value in provenance.items():
        if isinstance(value, Mapping):
            rows += [(f"{field}.{key}", text) for key, text in provenance_rows(value)]
        elif value is not None:
            rows.append((field, str(value)))
    return rows
