"""Everything that ``extract`` decides before it reads the first weight: model, prompts, targets, groups, device."""

import dataclasses
import hashlib
from typing import Any

import torch

from fisherkit.checkpoint.hub import ModelSource, resolve_model
from fisherkit.checkpoint.index import CheckpointIndex, open_index
from fisherkit.engine.covariance.plan import Form, memory_of_covariances
from fisherkit.engine.model.build import blocks_in_groups
from fisherkit.engine.model.checks import check_fit, folder_of
from fisherkit.engine.model.config import config_folder
from fisherkit.engine.model.device import choose_device
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.open_model import open_skeleton
from fisherkit.engine.model.plan import HEADROOM, Needs, Plan, choose_targets, fit_groups, needs
from fisherkit.engine.model.residence import weight_bytes
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import CheckpointError, counted
from fisherkit.options import ExtractOptions
from fisherkit.options.part import Part
from fisherkit.progress import Say
from fisherkit.prompts.dataset import PromptSet, load_prompts
from fisherkit.prompts.part import PartOfSet, take_part
from fisherkit.prompts.sources import PromptSource
from fisherkit.prompts.tokenizer import hash_tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that could start.

    Attributes:
        source: where the model is.
        skeleton: the model on the meta device.
        tokenizer_sha256: of all that decides how text is split; None in a dry run without a tokenizer.
        prompts: the samples; None in a dry run without prompts or without a tokenizer.
        part: what they are a part of; None where they are all.
        plan: targets, and blocks in groups.
        device: where it computes.
        options: as they were given.
    """

    source: ModelSource
    skeleton: Skeleton
    tokenizer_sha256: str | None
    prompts: PromptSet | None
    part: PartOfSet | None
    plan: Plan
    device: torch.device
    options: ExtractOptions

    def line(self) -> str:
        """Tell a person what will be measured, and how."""
        plan, dtype = self.plan, str(self.skeleton.dtype).removeprefix("torch.")
        return (
            f"{self.source.id}: {len(plan.tensors):,} tensors, {plan.parameters:,} weights in "
            f"{len(self.skeleton.blocks)} layers, {dtype} on {self.device}, "
            f"{counted(len(plan.groups), 'group')} of {counted(len(plan.groups[0]), 'layer')}"
        )

    def needs(self) -> Needs:
        """Estimate the peak memory, in bytes."""
        return needs(
            self.skeleton,
            self.plan,
            batch_tokens=self.options.batch_tokens,
            longest=_longest(self.prompts, self.options),
            on_host=self.device.type == "cpu",
            covariances=_covariance_memory(self.skeleton, self.plan, self.options),
        )

    def weights_fit(self) -> bool:
        """Return whether an accelerator can keep all weights between the sweeps; on a CPU the page cache does."""
        if self.device.type == "cpu":
            return False
        return bool(weight_bytes(self.skeleton) + self.needs().device <= HEADROOM * available_bytes(self.device))


def prepare(
    model: str, prompts: PromptSource | None, options: ExtractOptions, say: Say, *, dry_run: bool = False
) -> Prepared:
    """Look at everything and decide everything; reads headers, prompts and config, but no weights.

    Args:
        model: a local checkpoint, or ``org/name[@revision]``.
        prompts: see load_prompts; None only in a dry run.
        options: what to measure and how.
        say: gets the lines meant for a person.
        dry_run: the config alone is enough: weights, tokenizer and prompts are looked at where they are there.

    Raises:
        CheckpointError: model or tokenizer cannot be read, or do not belong together.
        OptionError: an option that this model cannot be measured with.
        PromptError: no sample to measure.
        UnsupportedModelError: no causal language model that can be measured.
    """
    source = resolve_model(model, weights=not dry_run)
    device = choose_device(options.device)
    config_folder(source.path)
    skeleton = open_skeleton(source, _open(source, dry_run), options, device, say)
    tokenizer = _tokenizer(source, options, dry_run)
    samples, part = None, None
    if tokenizer is not None and prompts is not None:
        samples = load_prompts(prompts, tokenizer, options, say=say)
        if options.shard is not None:
            samples, part = take_part(samples, Part(*options.shard))
        check_fit(source, skeleton, samples.samples)
    return Prepared(
        source=source,
        skeleton=skeleton,
        tokenizer_sha256=hash_tokenizer(tokenizer) if tokenizer is not None else None,
        prompts=samples,
        part=part,
        plan=_make_plan(skeleton, options, device, _longest(samples, options), say),
        device=device,
        options=options,
    )


def _open(source: ModelSource, dry_run: bool) -> CheckpointIndex | None:
    try:
        return open_index(source.path)
    except CheckpointError:
        if dry_run:
            return None
        raise


def _tokenizer(source: ModelSource, options: ExtractOptions, dry_run: bool) -> Any:
    """Load the tokenizer beside the model; None where there is none and the run is dry."""
    try:
        return load_tokenizer(folder_of(source), trust_remote_code=options.trust_remote_code)
    except CheckpointError:
        if dry_run:
            return None
        raise


def _longest(prompts: PromptSet | None, options: ExtractOptions) -> int:
    """Return the tokens of the longest sample; at most so many where there are no samples yet."""
    return max(len(sample.ids) for sample in prompts.samples) if prompts is not None else options.max_length


def _make_plan(skeleton: Skeleton, options: ExtractOptions, device: torch.device, longest: int, say: Say) -> Plan:
    """Choose targets and groups; a group size that would not fit the memory is lowered, and said."""
    targets = choose_targets(skeleton, options.targets, options.layers)
    wanted = Plan(blocks_in_groups(len(skeleton.blocks), options.group_size), targets)
    plan = fit_groups(
        skeleton,
        wanted,
        options.group_size,
        available_bytes(device),
        batch_tokens=options.batch_tokens,
        longest=longest,
        on_host=device.type == "cpu",
        covariances=_covariance_memory(skeleton, wanted, options),
    )
    if len(plan.groups) != len(wanted.groups):
        say(f"group size lowered from {options.group_size} to {len(plan.groups[0])}: more would not fit the memory")
    return plan


def form_of(options: ExtractOptions) -> Form:
    """Return which covariances the options ask for, and how they are stored."""
    if options.statistics != "inputs":
        return Form()
    return Form(outputs=False, rank=options.rank, code={"bf16": "BF16", "fp32": "F32"}[options.store])


def _covariance_memory(skeleton: Skeleton, plan: Plan, options: ExtractOptions) -> dict[int | None, int]:
    """Return the bytes that covariances take in memory, by block; nothing where none are gathered."""
    return memory_of_covariances(skeleton, plan, form_of(options)) if options.statistics != "fisher" else {}


def sha256(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
