"""The methods that act on a finished fine-tune: fapm's and merge's, on folders, with their own options."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import fisherkit
from fisherkit import FapmOptions, MergeOptions
from fisherkit.options import Metric


@dataclass(frozen=True)
class PostHoc:
    """A way to keep part of a fine-tune.

    Attributes:
        metric: of fapm; None for merge's interpolation, whose alpha is the setting (fapm's setting is the sparsity).
        of: method and setting of the fine-tune; controls are of plain fine-tuning at its full rate.
    """

    metric: Metric | None
    of: tuple[str, str] = ("plain", "1")


POSTHOC: Mapping[str, PostHoc] = {
    "fapm": PostHoc("fapm"),
    "magnitude": PostHoc("magnitude"),
    "random": PostHoc("random"),
    "relative": PostHoc("relative"),
    "dare": PostHoc("dare"),
    "wise-ft": PostHoc(None),
    "fggm+fapm": PostHoc("fapm", ("fggm", "input-tensor-0.3")),
    "lora+fapm": PostHoc("fapm", ("lora", "1")),
    "lora+magnitude": PostHoc("magnitude", ("lora", "1")),
}
"""By name."""


def keep_part(method: str, setting: str, base: Path, tuned: Path, out: Path, seed: int) -> None:
    """Write a checkpoint with the part that the method keeps."""
    metric = POSTHOC[method].metric
    if metric is None:
        fisherkit.merge(base, tuned, out, MergeOptions(alpha=float(setting)))
    else:
        fisherkit.fapm(base, tuned, out, FapmOptions(metric=metric, sparsity=float(setting), seed=seed))
