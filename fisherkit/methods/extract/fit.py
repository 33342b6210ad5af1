"""Whether a run fits the memory: how much there is, the plan for it, and a refusal that says what would help."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fisherkit.checkpoint.atomic import size_text
from fisherkit.engine.covariance.plan import Form, memory_of_covariances
from fisherkit.engine.model.build import blocks_in_groups
from fisherkit.engine.model.fitting import divide, fit_plan
from fisherkit.engine.model.memory import available_bytes, used_bytes
from fisherkit.engine.model.needs import HEADROOM, IMPORTED_BYTES, Estimate, Load, Needs, Rooms
from fisherkit.engine.model.plan import Plan, choose_targets, only_batches_of_one
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import FisherkitError, OptionError
from fisherkit.options import ExtractOptions
from fisherkit.progress import Say
from fisherkit.prompts.dataset import PromptSet, batches

_SAMPLES = 200  # where neither prompts nor --limit say how many there are
_MOST_SPOOLED = 8  # a run keeps at most this part of the free memory full of hidden states


def room_for(options: ExtractOptions, device: torch.device, *, dry_run: bool) -> Rooms:
    """Return the memory that a run may take: what there is, or what --memory and --device-memory say.

    Args:
        options: of the run.
        device: to compute on.
        dry_run: the memory is that of another machine; otherwise no more is taken than there is here.

    Raises:
        OptionError: --device-memory for a device that has none of its own.
    """
    cpu = torch.device("cpu")
    # What the process has imported is part of the needs; what else it holds has nothing to do with the run.
    here = available_bytes(cpu) + min(used_bytes(cpu), IMPORTED_BYTES)
    host = _least(options.memory, here, dry_run=dry_run)
    if device.type == "cpu":
        if options.device_memory is not None:
            raise OptionError(f"--device-memory: {device} computes in the host's memory; give --memory")
        return Rooms(host)
    if options.device_memory is not None and dry_run:
        return Rooms(host, options.device_memory)
    return Rooms(host, _least(options.device_memory, available_bytes(device), dry_run=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A plan and the memory it was made for.

    Attributes:
        plan: of the run.
        estimate: of its memory.
        rooms: what there is.
    """

    plan: Plan
    estimate: Estimate
    rooms: Rooms

    @property
    def needs(self) -> Needs:
        """Peak bytes of the run, without the hidden states that it keeps in spare memory."""
        return self.estimate.needs(self.plan)

    @property
    def holds(self) -> bool:
        """Whether the plan fits."""
        return self.rooms.hold(self.needs)

    @property
    def spool_bytes(self) -> int:
        """Bytes of hidden states that are kept in memory besides; the rest is read back from the disk."""
        spare = int(HEADROOM * self.rooms.host) - self.needs.host
        return max(0, min(self.estimate.boundary_bytes(self.plan), spare, self.rooms.host // _MOST_SPOOLED))

    def peak(self) -> Needs:
        """Return the peak bytes of the run, all told."""
        return Needs(host=self.needs.host + self.spool_bytes, device=self.needs.device)

    def with_groups(self, groups: tuple[tuple[int, ...], ...], skeleton: Skeleton) -> "Fit":
        """Return the plan for groups that a killed run began with, for the memory that there is now."""
        plan = dataclasses.replace(self.plan, groups=groups, sums_at_once=None, read_ahead=True)
        kept = dataclasses.replace(self, plan=plan)
        if kept.holds:
            return kept
        plan = divide(self.estimate, skeleton, dataclasses.replace(plan, read_ahead=False), self.rooms)
        return dataclasses.replace(self, plan=plan)


def fit(
    skeleton: Skeleton, prompts: PromptSet | None, options: ExtractOptions, rooms: Rooms, say: Say = lambda line: None
) -> Fit:
    """Choose targets, groups and parts; what is lowered for want of memory is said.

    Args:
        skeleton: the model.
        prompts: the samples; None where there are none yet.
        options: of the run.
        rooms: the memory there is.
        say: gets the lines meant for a person.
    """
    wanted = Plan(
        blocks_in_groups(len(skeleton.blocks), options.group_size),
        choose_targets(skeleton, options.targets, options.layers),
    )
    estimate = Estimate(
        skeleton,
        wanted,
        _load(skeleton, wanted, prompts, options),
        on_host=rooms.device is None,
    )
    plan = fit_plan(estimate, skeleton, wanted, options.group_size, rooms)
    found = Fit(plan=plan, estimate=estimate, rooms=rooms)
    if not found.holds:
        return found  # what does not fit at all is refused, with the reason
    if len(plan.groups) != len(wanted.groups):
        asked, size = len(wanted.groups[0]), len(plan.groups[0])
        say(f"group size lowered from {asked} to {size}: more would not fit the memory")
    if plan.sums_at_once is not None:
        say("the targets of a layer are measured in parts, with a replay for each: together they would not fit")
    return found


def refuse_misfit(
    found: Fit, skeleton: Skeleton, prompts: PromptSet | None, options: ExtractOptions, name: str
) -> None:
    """Refuse a run that does not fit.

    Raises:
        FisherkitError: it says what is needed, what there is, and what would help.
    """
    if not found.holds:
        raise FisherkitError(misfit(found, skeleton, prompts, options, name))


def misfit(found: Fit, skeleton: Skeleton, prompts: PromptSet | None, options: ExtractOptions, name: str) -> str:
    """Say what a run that does not fit needs, what there is, and which option would help."""
    need, rooms = found.needs, found.rooms
    if need.host > HEADROOM * rooms.host:
        where, needed, there = "memory", need.host, rooms.host
    else:
        where, needed, there = "device memory", need.device, rooms.device or 0
    help_ = next(_helpful(skeleton, prompts, options, rooms), None) or "no option would make it fit"
    size = len(found.plan.groups[0])
    layers = "one layer" if size == 1 else f"{size} layers"
    return (
        f"{name}: {layers} at a time, in as many parts as can be, needs {size_text(needed / HEADROOM)} of {where}, and "
        f"there are {size_text(there)}; {help_}"
    )


def _helpful(skeleton: Skeleton, prompts: PromptSet | None, options: ExtractOptions, rooms: Rooms) -> Iterator[str]:
    """Yield options with which the run would fit."""
    longest = max(len(sample.ids) for sample in prompts.samples) if prompts is not None else options.max_length
    changes: list[tuple[str, Mapping[str, Any]]] = []
    if options.tokens_per_batch > longest:
        changes.append((f"--batch-tokens {longest}", {"batch_tokens": longest}))
    if options.statistics == "activations":
        changes.append(("--statistics fisher", {"statistics": "fisher"}))
    lengths = [length for length in (longest // 2, longest // 4, 32) if 2 <= length < longest]
    changes += [(f"--max-length {length}", {"max_length": length, "batch_tokens": length}) for length in lengths]
    if options.targets == "all":
        changes.append(("--targets matrices", {"targets": "matrices"}))
    dtypes = [skeleton.dtype] + ([torch.bfloat16] if skeleton.dtype == torch.float32 else [])
    for dtype in dtypes:
        other = dataclasses.replace(skeleton, dtype=dtype)
        for words, change in [("", {}), *changes]:
            shorter = None if "max_length" in change else prompts
            if fit(other, shorter, dataclasses.replace(options, **change), rooms).holds:
                asked = " ".join(filter(None, ("" if dtype == skeleton.dtype else "--dtype bfloat16", words)))
                if asked:
                    yield f"{asked} would fit"


def _load(skeleton: Skeleton, plan: Plan, prompts: PromptSet | None, options: ExtractOptions) -> Load:
    """Return what is pushed through the model; at most so much where there are no samples yet."""
    covariances = {} if options.statistics == "fisher" else memory_of_covariances(skeleton, plan, form_of(options))
    if prompts is None:
        longest, count = options.max_length, options.limit or _SAMPLES
        tokens, largest = longest * count, min(longest * count, max(longest, options.tokens_per_batch))
    else:
        lengths = [len(sample.ids) for sample in prompts.samples]
        longest, tokens = max(lengths), sum(lengths)
        packed = batches(prompts.samples, options.tokens_per_batch)
        largest = max(len(batch) * max(lengths[at] for at in batch) for batch in packed)
    if only_batches_of_one(skeleton, plan):
        largest = longest
    inputs_only = options.statistics == "inputs"
    return Load(batch_tokens=largest, longest=longest, tokens=tokens, covariances=covariances, inputs_only=inputs_only)


def form_of(options: ExtractOptions) -> Form:
    """Return which covariances the options ask for, and how they are stored."""
    if options.statistics != "inputs":
        return Form()
    return Form(outputs=False, rank=options.rank, code={"bf16": "BF16", "fp32": "F32"}[options.store])


def _least(wanted: int | None, here: int, *, dry_run: bool) -> int:
    return here if wanted is None else wanted if dry_run else min(wanted, here)
