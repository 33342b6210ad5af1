"""Methods that act on a finished fine-tune: fapm's and merge's, on folders, with their own options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import fisherkit
from benchmarks.forgetting.held import shield_mask
from benchmarks.forgetting.tasks import Item
from benchmarks.forgetting.world import World, write_prompts
from fisherkit import ExtractOptions, FapmOptions, MergeOptions
from fisherkit.options import Metric


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A fine-tune of which a part is to be kept.

    Attributes:
        world: what all runs share.
        tuned: folder of the fine-tune, a model or an adapter.
        items: training items of the task that it learnt.
        seed: of the run.
        folder: for what a method writes; empty.
    """

    world: World
    tuned: Path
    items: list[Item]
    seed: int
    folder: Path

    def inputs(self) -> Path:
        """Covariances of what goes into the fine-tune's layers on the new items."""
        prompts, out = write_prompts(self.folder / "new.jsonl", self.items), self.folder / "inputs.safetensors"
        size = self.world.size
        options = ExtractOptions(
            statistics="inputs", limit=size.probes, batch_tokens=4096, device=size.device, force=True
        )
        fisherkit.extract(self.tuned, prompts, out, options)
        return out

    def fisher(self) -> Path:
        """Return the fine-tune's own Fisher on the new items."""
        prompts, out = write_prompts(self.folder / "new.jsonl", self.items), self.folder / "fisher.safetensors"
        fisherkit.extract(self.tuned, prompts, out, self.world.extract_options())
        return out


@dataclass(frozen=True)
class PostHoc:
    """A way to keep part of a fine-tune.

    Attributes:
        how: a metric of fapm, whose setting is the sparsity; or options of merge, made from fine-tune and setting.
        of: method and setting of the fine-tune.
    """

    how: Metric | Callable[[Finished, str], MergeOptions]
    of: tuple[str, str] = ("plain", "-@1")


def _interpolated(run: Finished, setting: str) -> MergeOptions:
    return MergeOptions(alpha=float(setting))


def _shielded(run: Finished, setting: str) -> MergeOptions:
    return MergeOptions(subspace=shield_mask(run.world, setting))


def _layer_scaled(run: Finished, setting: str) -> MergeOptions:
    """As the card of Gemma 4 Masks describes; the setting is the power."""
    layers = run.world.fisher("prompts").with_name("layer_importance.json")
    return MergeOptions(layer_scale=layers, power=float(setting))


def _regmean(run: Finished, setting: str) -> MergeOptions:
    """Solve with the covariances of old and new inputs; the setting is the weight of the old ones."""
    return MergeOptions(regmean=(run.world.fisher(), run.inputs()), old_weight=float(setting))


def _fisher(run: Finished, setting: str) -> MergeOptions:
    return MergeOptions(fisher=(run.world.fisher(), run.fisher()), old_weight=float(setting))


POSTHOC: Mapping[str, PostHoc] = {
    "fapm": PostHoc("fapm"),
    "magnitude": PostHoc("magnitude"),
    "random": PostHoc("random"),
    "relative": PostHoc("relative"),
    "dare": PostHoc("dare"),
    "wise-ft": PostHoc(_interpolated),
    "shield-merge": PostHoc(_shielded),
    "layer-scale-merge": PostHoc(_layer_scaled),
    "regmean": PostHoc(_regmean),
    "fisher-merge": PostHoc(_fisher),
    "long+fapm": PostHoc("fapm", ("plain", "-@1x4")),
    "fggm+fapm": PostHoc("fapm", ("fggm", "0.3@1")),
    "lora+fapm": PostHoc("fapm", ("lora", "16@1")),
    "lora+layer-scale-merge": PostHoc(_layer_scaled, ("lora", "16@1")),
}
"""By name."""


def keep_part(run: Finished, method: str, setting: str, out: Path) -> None:
    """Write a checkpoint with the part that the method keeps."""
    how, base = POSTHOC[method].how, run.world.base
    if callable(how):
        fisherkit.merge(base, run.tuned, out, how(run, setting))
    else:
        fisherkit.fapm(base, run.tuned, out, FapmOptions(metric=how, sparsity=float(setting), seed=run.seed))
