"""Where a combined Fisher comes from, as its sidecar says it."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fisherkit._version import __version__
from fisherkit.methods.combine.parts import MeasuredPart, missing_parts
from fisherkit.options.combine import CombineOptions


def provenance(parts: Sequence[MeasuredPart], options: CombineOptions) -> dict[str, Any]:
    """Return the sidecar without what is known of the finished file.

    What all parts have in common is the first one's; samples and tokens are those of all. ``combined`` lists the parts
    with their weights.

    Args:
        parts: in the order in which they are added.
        options: of the command.
    """
    first = parts[0].made
    sidecars = [part.made for part in parts]
    missing = missing_parts(sidecars)
    taken = {key: first[key] for key in ("format", "kind", "model", "estimator", "blocks", "layers") if key in first}
    run = {**first["run"], "engine": "combined", "reason": "", "store": options.store}
    return {
        **taken,
        "fisherkit": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "prompts": _prompts(sidecars, whole=not missing and "part" in first),
        "run": {key: value for key, value in run.items() if key not in ("fingerprint", "seconds")},
        **({"loss": _loss(parts)} if "estimator" in first else {}),
        "combined": {
            "parts": [_about(part) for part in parts],
            "missing": missing,
        },
    }


def _about(part: MeasuredPart) -> dict[str, Any]:
    own = part.made.get("part")
    return {
        "file": part.path.name,
        "content_sha256": part.made.get("content_sha256"),
        "part": f"{own['number']}/{own['of']}" if own else None,
        "prompts": part.made["prompts"].get("source"),
        "samples": part.samples,
        "weight": part.weight,
        "store": part.made["run"].get("store"),
    }


def _prompts(sidecars: Sequence[Mapping[str, Any]], *, whole: bool) -> dict[str, Any]:
    """Return the report on the prompts of all parts; the hash is the whole set's where all of it is there."""
    reports = [made["prompts"] for made in sidecars]
    sums = {key: sum(one.get(key, 0) for one in reports) for key in ("samples", "tokens", "loss_tokens")}
    sources = list(dict.fromkeys(str(one.get("source")) for one in reports))
    hashed = {"sha256": sidecars[0]["part"]["sha256"] if whole else None, "rows_used": None}
    return {**reports[0], **sums, **hashed, "source": " + ".join(sources)}


def _loss(parts: Sequence[MeasuredPart]) -> float | None:
    """Return the mean loss, weighed as the parts are; None where one does not note it."""
    losses = [part.made.get("loss") for part in parts]
    if any(loss is None for loss in losses):
        return None
    return math.fsum(part.weight * loss for part, loss in zip(parts, losses, strict=True) if loss is not None)
