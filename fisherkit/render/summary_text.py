"""A summary in words: its headline, where the mass lies, how far two files agree, what a person must not overlook."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fisherkit.errors import some_names
from fisherkit.methods.inspect.compare import Overlap
from fisherkit.methods.inspect.heat_map import ratios
from fisherkit.methods.inspect.rows import SummaryRow
from fisherkit.methods.inspect.summary import Summary
from fisherkit.render.formatting import number, percent, printable

KINDS = {
    "fisher": "Fisher",
    "mask": "Mask",
    "subspace": "Protected directions",
    "checkpoint": "Weights",
    "importance": "Layer importance",
}
_DIRECTIONS = {"train": "the top may change (train)", "protect": "the top is frozen (protect)"}


def row_label(row: SummaryRow, by: str) -> str:
    """Return a row's name for a person: blocks by their number, everything else in full."""
    if by != "layer" or row.layer is None:
        return printable(row.name)
    return f"{row.layer}" if row.last_layer in (None, row.layer) else f"{row.layer}-{row.last_layer}"


def headline(summary: Summary) -> str:
    """Say in one line what was read."""
    total, made = summary.total, summary.provenance or {}
    name = made.get("model", {}).get("id") or str(summary.path)
    parts = [" against ".join(pair_names(summary))] if summary.other is not None else []
    parts += [f"{KINDS[summary.kind]} of {name}" if summary.kind == "fisher" else f"{KINDS[summary.kind]} in {name}"]
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
    """Say how a mask came about, as far as its description tells."""
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
    """Say where the mass lies; None where it is not known."""
    mass = summary.mass()
    if not mass:
        return None
    shares = [
        f"{100 * top:.0f} %{' of the weights hold' if not place else ''} {percent(share)}"
        for place, (top, share) in enumerate(mass)
    ]
    return f"The top {', '.join(shares)} of the total."


def agreement_sentence(summary: Summary) -> str | None:
    """Say how far two files agree, and what chance would give; None where there is only one file."""
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


def ratio_sentence(summary: Summary) -> str | None:
    """Say how the totals of two files compare, which the map of ratios leaves out; None where there is no such map."""
    if summary.other is None or summary.heat.linear:
        return None
    overall = ratios(summary.heat, summary.other.heat).overall
    if math.isnan(overall):
        return None
    one, two = pair_names(summary)
    return f"Over what both have, the total of {one} is {number(2.0**overall)} times that of {two}."


def quota_sentence(summary: Summary, *, bands: bool = False) -> str | None:
    """Say what a mask's map of one colour would show; None where densities differ.

    Args:
        summary: of a mask.
        bands: a drawing of rows and heads is near.
    """
    if summary.kind != "mask" or not summary.heat.is_flat:
        return None
    heat = summary.heat
    share = percent(sum(heat.means[cell] * heat.weights[cell] for cell in heat.means) / sum(heat.weights.values()))
    where = "what varies is where in a tensor they are" if bands else "-o FILE.html draws where in a tensor they are"
    return f"Every tensor of the blocks lets {share} of its weights change; {where}."


def pair_names(summary: Summary) -> tuple[str, str]:
    """Return short names of the two files that are compared, which differ wherever the paths do."""
    assert summary.comparison is not None
    one, two = summary.path.absolute(), summary.comparison.path.absolute()
    for length in range(1, max(len(one.parts), len(two.parts)) + 1):
        names = ["/".join(path.parts[-length:]) for path in (one, two)]
        if names[0] != names[1]:
            return printable(names[0]), printable(names[1])
    return printable(one.name), f"{printable(two.name)} (the same)"


def sentences(summary: Summary, *, bands: bool = False) -> list[str]:
    """Say what the figures come to.

    Args:
        summary: of one file, or of the comparison of two.
        bands: a drawing of a mask's rows and heads is near.
    """
    texts = (mass_sentence(summary), quota_sentence(summary, bands=bands), agreement_sentence(summary))
    return [text for text in (*texts, ratio_sentence(summary)) if text]


def warnings(summary: Summary) -> list[str]:
    """List what a person must not overlook, worst first."""
    lines = []
    if summary.broken:
        values = f"{summary.total.nonfinite:,} value{'s' if summary.total.nonfinite > 1 else ''}"
        lines.append(f"not finite: {values} in {_tensors(summary.broken)}: {printable(some_names(summary.broken))}")
    if summary.dead and summary.kind == "fisher":
        reason = "no gradient got there: never routed to, or unused"
        lines.append(f"{_tensors(summary.dead)} zero throughout ({reason}): {printable(some_names(summary.dead))}")
    if summary.comparison and (summary.comparison.only_here or summary.comparison.only_there):
        one, two = summary.comparison.only_here, summary.comparison.only_there
        common = _tensors(list(summary.comparison.tensors))
        lines.append(f"compared {common} that both files have; {one} only here, {two} only there")
    return lines


def _tensors(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"
