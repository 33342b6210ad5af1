"""Everything that ``extract`` decides before it reads the first weight: model, prompts, targets, groups, device."""

import dataclasses
import hashlib
from typing import Any

import torch

from fisherkit.checkpoint.hub import ModelSource, resolve_model
from fisherkit.checkpoint.index import CheckpointIndex, open_index
from fisherkit.engine.model.checks import check_fit, folder_of
from fisherkit.engine.model.config import config_folder
from fisherkit.engine.model.device import choose_device
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.needs import HEADROOM, Rooms
from fisherkit.engine.model.open_model import open_skeleton
from fisherkit.engine.model.plan import Plan
from fisherkit.engine.model.residence import weight_bytes
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.engine.ranks.ranks import ALONE, Ranks
from fisherkit.errors import CheckpointError, counted
from fisherkit.methods.extract.fit import Fit, fit, refuse_misfit, room_for
from fisherkit.options import ExtractOptions
from fisherkit.options.extract import LEAST_BATCH
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
        fit: the plan, and the memory that it was made for.
        device: where it computes.
        options: as they were given, but for what the device decides.
        ranks: the processes that measure together.
    """

    source: ModelSource
    skeleton: Skeleton
    tokenizer_sha256: str | None
    prompts: PromptSet | None
    part: PartOfSet | None
    fit: Fit
    device: torch.device
    options: ExtractOptions
    ranks: Ranks = ALONE

    @property
    def plan(self) -> Plan:
        """Targets, and blocks in groups."""
        return self.fit.plan

    def line(self) -> str:
        """Tell a person what will be measured, and how."""
        plan, dtype = self.plan, str(self.skeleton.dtype).removeprefix("torch.")
        return (
            f"{self.source.id}: {len(plan.tensors):,} tensors, {plan.parameters:,} weights in "
            f"{len(self.skeleton.blocks)} layers, {dtype} on {self.device}, "
            f"{counted(len(plan.groups), 'group')} of {counted(len(plan.groups[0]), 'layer')}"
        )

    def weights_fit(self) -> bool:
        """Return whether an accelerator can keep all weights between the sweeps; on a CPU the page cache does."""
        if self.device.type == "cpu":
            return False
        room = self.ranks.share(available_bytes(self.device), self.device)
        return bool(weight_bytes(self.skeleton) + self.fit.needs.device <= HEADROOM * room)


def prepare(
    model: str,
    prompts: PromptSource | None,
    options: ExtractOptions,
    say: Say,
    *,
    dry_run: bool = False,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Look at everything and decide everything; reads headers, prompts and config, but no weights.

    Args:
        model: a local checkpoint, or ``org/name[@revision]``.
        prompts: see load_prompts; None only in a dry run.
        options: what to measure and how.
        say: gets the lines meant for a person.
        dry_run: the config alone is enough: weights, tokenizer and prompts are looked at where they are there.
        ranks: the processes that measure together; the first one reads the prompts for all.

    Raises:
        CheckpointError: model or tokenizer cannot be read, or do not belong together.
        OptionError: an option that this model cannot be measured with.
        PromptError: no sample to measure.
        UnsupportedModelError: no causal language model that can be measured.
        FisherkitError: the run does not fit the memory.
    """
    is_there = dry_run and options.device_memory is not None  # the device, which need not be here
    is_elsewhere = dry_run and not (options.memory is None and options.device_memory is None)
    with ranks.together():
        source = resolve_model(model, weights=not dry_run)
        device = _device_there(options) if is_there else ranks.device(choose_device(options.device))
        asked, options = options, options.on(device.type)
        config_folder(source.path)
        skeleton = open_skeleton(source, _open(source, dry_run), options, device, say, probe=not is_elsewhere)
        tokenizer = _tokenizer(source, options, dry_run)
    samples, part = None, None
    if tokenizer is not None and prompts is not None:
        samples = ranks.from_first(lambda: load_prompts(prompts, tokenizer, options, say=say))
        with ranks.together():
            if options.shard is not None:
                samples, part = take_part(samples, Part(*options.shard))
            check_fit(source, skeleton, samples.samples)
    with ranks.together():
        rooms = room_for(options, device, dry_run=dry_run)
    rooms = _shared(rooms, device, ranks)
    found = fit(skeleton, samples, options, rooms, say)
    if not found.holds and asked.batch_tokens is None:
        options = dataclasses.replace(options, batch_tokens=LEAST_BATCH)
        found = fit(skeleton, samples, options, rooms, say)
    with ranks.together():
        if not dry_run and options.engine != "resident":
            refuse_misfit(found, skeleton, samples, options, source.id)
    return Prepared(
        source=source,
        skeleton=skeleton,
        tokenizer_sha256=hash_tokenizer(tokenizer) if tokenizer is not None else None,
        prompts=samples,
        part=part,
        fit=found,
        device=device,
        options=options,
        ranks=ranks,
    )


def _device_there(options: ExtractOptions) -> torch.device:
    """Return the device of another machine, one with memory of its own where none is named."""
    return torch.device("cuda" if options.device == "auto" else options.device)


def _shared(rooms: Rooms, device: torch.device, ranks: Ranks) -> Rooms:
    """Return what each of the processes may take of a memory that they share; the same for all, so that plans are."""
    host = ranks.share(rooms.host, torch.device("cpu"))
    return Rooms(host, None if rooms.device is None else ranks.share(rooms.device, device))


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


def sha256(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
