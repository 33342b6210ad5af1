"""Methods that act on a finished fine-tune: fapm's and merge's, on folders, with their own options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import fisherkit
from benchmarks.forgetting.methods import shield_mask
from benchmarks.forgetting.world import World
from fisherkit import FapmOptions, MergeOptions
from fisherkit.options import Metric


@dataclass(frozen=True)
class PostHoc:
    """A way to keep part of a fine-tune.

    Attributes:
        how: a metric of fapm, whose setting is the sparsity; or options of merge, made from world and setting.
        of: method and setting of the fine-tune; controls are of plain fine-tuning at its full rate.
    """

    how: Metric | Callable[[World, str], MergeOptions]
    of: tuple[str, str] = ("plain", "1")


def _interpolated(world: World, setting: str) -> MergeOptions:
    return MergeOptions(alpha=float(setting))


def _shielded(world: World, setting: str) -> MergeOptions:
    return MergeOptions(subspace=shield_mask(world, setting))


POSTHOC: Mapping[str, PostHoc] = {
    "fapm": PostHoc("fapm"),
    "magnitude": PostHoc("magnitude"),
    "random": PostHoc("random"),
    "relative": PostHoc("relative"),
    "dare": PostHoc("dare"),
    "wise-ft": PostHoc(_interpolated),
    "shield-merge": PostHoc(_shielded),
    "shield+fapm": PostHoc("fapm", ("shield", "0.2@2")),
    "fggm+fapm": PostHoc("fapm", ("fggm", "input-tensor-0.3")),
    "lora+fapm": PostHoc("fapm", ("lora", "0.25")),
    "lora+magnitude": PostHoc("magnitude", ("lora", "0.25")),
}
"""By name."""


def keep_part(world: World, method: str, setting: str, tuned: Path, out: Path, seed: int) -> None:
    """Write a checkpoint with the part that the method keeps."""
    how = POSTHOC[method].how
    if callable(how):
        fisherkit.merge(world.base, tuned, out, how(world, setting))
    else:
        fisherkit.fapm(world.base, tuned, out, FapmOptions(metric=how, sparsity=float(setting), seed=seed))
