"""What tables on the terminal and figures in files share: colours, short numbers, short names, sentences.

Knows neither: text and numbers in, text and colours out. Standard library only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fisherkit.errors import some_names
from fisherkit.methods.inspect.compare import Overlap
from fisherkit.methods.inspect.summary import Row, Summary

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
_SUFFIXES = ("", "k", "M", "G", "T")
KINDS = {
    "fisher": "Fisher",
    "mask": "Mask",
    "subspace": "Protected directions",
    "checkpoint": "Weights",
    "importance": "Layer importance",
}
_DIRECTIONS = {"train": "the top may change (train)", "protect": "the top is frozen (protect)"}


def colour(level: float) -> RGB:
    """The colour of a level from 0 to 1; what lies outside takes the nearest end."""
    place = min(max(level, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(place), len(_VIRIDIS) - 2)
    low, high, part = _VIRIDIS[index], _VIRIDIS[index + 1], place - index
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def count(number: int) -> str:
    """``29286727680`` as ``29.3 G``; below a thousand in full."""
    size, step = float(number), 0
    while size >= 999.5 and step < len(_SUFFIXES) - 1:
        size, step = size / 1000, step + 1
    return f"{number}" if step == 0 else f"{size:.3g} {_SUFFIXES[step]}"


def number(value: float | int | str | None) -> str:
    """A figure in four digits; ``-`` for what is unknown."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        return f"{value:.3e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:#.4g}" if value else "0"
    return "-" if value is None else str(value)


def percent(share: float | None) -> str:
    """``0.0123`` as ``1.23 %``; ``-`` for what is unknown."""
    if share is None:
        return "-"
    if 0 < share < 5e-5:
        return "<0.01 %"
    return f"{100 * share:.1f} %" if share >= 0.09995 else f"{100 * share:.2f} %"


def printable(text: str) -> str:
    """The text with everything that a terminal might obey, such as escapes and line ends, spelled out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def row_label(row: Row, by: str) -> str:
    """A row's name for a person: blocks by their number, everything else in full."""
    return str(row.layer) if by == "layer" and row.layer is not None else printable(row.name)


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """The shortest endings of dotted names that still tell them apart; ``self_attn.q_proj`` as ``q``."""
    short: dict[str, str] = {}
    for module in modules:
        parts = module.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in modules) == 1)
        short[module] = next(alone, module)
    bare = {module: end.removesuffix("_proj") for module, end in short.items()}
    return bare if len(set(bare.values())) == len(bare) else short


def headline(summary: Summary) -> str:
    """One line that says what was read."""
    total, made = summary.total, summary.provenance or {}
    name = made.get("model", {}).get("id") or str(summary.path)
    parts = [f"{KINDS[summary.kind]} of {name}" if summary.kind == "fisher" else f"{KINDS[summary.kind]} in {name}"]
    if summary.kind != "importance":
        parts.append(f"{total.tensors:,} tensors, {total.weights:,} weights")
    if summary.kind == "mask":
        parts.append(f"{percent(total.mean)} may change" + _chosen(made))
    if summary.kind == "subspace" and made.get("options", {}).get("pull") is not None:
        parts.append(f"soft (pull {made['options']['pull']})")
    prompts = made.get("prompts", {})
    if prompts.get("samples") is not None:
        parts.append(f"{prompts['samples']} prompts ({prompts.get('source')})")
    return printable("; ".join(parts))


def _chosen(made: Mapping[str, Any]) -> str:
    """How a mask came about, as far as it says so."""
    options = made.get("options") or {}
    known = [_DIRECTIONS.get(str(made.get("direction")), "")]
    if options.get("keep") is not None:
        units = {"input": "rows", "output": "columns"}.get(str(options.get("aggregate")), "entries")
        score = str(options.get("score"))
        scope = "of the model" if options.get("scope") == "global" else f"per {options.get('scope')}"
        known.append(f"top {100 * float(options['keep']):g} % of {units} {scope} by {score}")
    text = ", ".join(part for part in known if part)
    return f": {text}" if text else ""


def mass_sentence(summary: Summary) -> str | None:
    """Where the mass lies, in words; None where it is not known."""
    mass = summary.mass()
    if not mass:
        return None
    shares = [
        f"{100 * top:.0f} %{' of the weights hold' if not place else ''} {percent(share)}"
        for place, (top, share) in enumerate(mass)
    ]
    return f"The top {', '.join(shares)} of the total."


def agreement_sentence(summary: Summary) -> str | None:
    """How far two files agree, in words, with what chance would give; None where there is only one file."""
    agreement = summary.total.agreement
    if summary.comparison is None or agreement is None:
        return None
    if isinstance(agreement, Overlap):
        return (
            f"Against {printable(str(summary.comparison.path))}: Jaccard overlap of what may change "
            f"{number(agreement.jaccard)} (chance {number(agreement.chance)})."
        )
    correlation, ten, thirty = (number(getattr(agreement, column)) for column in agreement.COLUMNS)
    return (
        f"Against {printable(str(summary.comparison.path))}: rank correlation {correlation}, overlap of the top 10 % "
        f"{ten} (chance 0.1), of the top 30 % {thirty} (chance 0.3)."
    )


def sentences(summary: Summary) -> list[str]:
    """What the figures come to, in words."""
    return [text for text in (mass_sentence(summary), agreement_sentence(summary)) if text]


def warnings(summary: Summary) -> list[str]:
    """What a person must not overlook, worst first."""
    found = []
    if summary.broken:
        values = f"{summary.total.nonfinite:,} value{'s' if summary.total.nonfinite > 1 else ''}"
        found.append(f"not finite: {values} in {_tensors(summary.broken)}: {printable(some_names(summary.broken))}")
    if summary.dead and summary.kind == "fisher":
        reason = "no gradient got there: never routed to, or unused"
        found.append(f"{_tensors(summary.dead)} zero throughout ({reason}): {printable(some_names(summary.dead))}")
    if summary.comparison and (summary.comparison.only_here or summary.comparison.only_there):
        one, two = summary.comparison.only_here, summary.comparison.only_there
        common = _tensors(list(summary.comparison.tensors))
        found.append(f"compared {common} that both files have; {one} only here, {two} only there")
    return found


def _tensors(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"


def provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested provenance as flat ``(field, text)`` pairs: ``("prompts.rows", "200")``; what is null is left out."""
    rows = []
    for field, value in provenance.items():
        if isinstance(value, Mapping):
            rows += [(f"{field}.{key}", text) for key, text in provenance_rows(value)]
        elif value is not None:
            rows.append((field, str(value)))
    return rows
