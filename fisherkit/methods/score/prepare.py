"""Everything that ``score`` decides before it reads the first weight: models, tokenizers, prompts, groups, device."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import transformers

from fisherkit._version import __version__
from fisherkit.engine.model.checks import check_fit, folder_of
from fisherkit.engine.model.device import choose_device
from fisherkit.engine.model.forward_plan import fit_forward, forward_bytes
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.needs import HEADROOM
from fisherkit.engine.model.open_model import open_skeleton
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.methods.score.candidates import Candidate
from fisherkit.methods.score.sets import ScoredSet, first_difference, load_alike, load_sets
from fisherkit.options import ScoreOptions
from fisherkit.options.extract import LEAST_BATCH
from fisherkit.progress import Say
from fisherkit.prompts.dataset import Sample
from fisherkit.prompts.sources import PromptSource
from fisherkit.prompts.tokenizer import hash_tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Model:
    """One checkpoint that could be run.

    Attributes:
        candidate: as it was opened.
        skeleton: the model on the meta device.
        sets: prompts in its own tokens; the very sets of the first model unless bytes are compared.
        samples: of all sets, in order.
        groups: of blocks.
    """

    candidate: Candidate
    skeleton: Skeleton
    sets: tuple[ScoredSet, ...]
    samples: tuple[Sample, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that could start.

    Attributes:
        models: in order; the first is what the others are compared with.
        tokenizer: of the first.
        device: where it computes.
        options: as they were given, but for what the device decides.
    """

    models: tuple[Model, ...]
    tokenizer: Any
    device: torch.device
    options: ScoreOptions

    def fingerprint(self) -> dict[str, str]:
        """Return what must be the same for a killed run to go on, by what a person would call it."""
        options = self.options
        return {
            "checkpoints": json.dumps(
                [
                    [model.candidate.tensors.fingerprint(), model.skeleton.model.config.to_json_string()]
                    for model in self.models
                ]
            ),
            "prompts": json.dumps(
                [[[one.name, one.prompts.report.sha256] for one in model.sets] for model in self.models]
            ),
            "options": json.dumps([options.engine, options.tokens_per_batch, options.choices]),
            "device": self.device.type,
            "dtype": " ".join(str(model.skeleton.dtype) for model in self.models),
            "versions": f"fisherkit {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        }


def prepare(
    candidates: Sequence[Candidate], prompts: Mapping[str, PromptSource], options: ScoreOptions, say: Say
) -> Prepared:
    """Look at everything and decide everything; reads headers, prompts and configs, but no weights.

    Args:
        candidates: checkpoints; the first is what the others are compared with.
        prompts: sources by the names of the sets.
        options: how they are read and run.
        say: gets the lines meant for a person.

    Raises:
        CheckpointError: a model or tokenizer cannot be read, or tokenizers differ where tokens are compared.
        OptionError: no candidate, no prompts, or an option that a model cannot be run with.
        PromptError: a set has nothing to score.
        UnsupportedModelError: no causal language model that can be run.
    """
    if not candidates:
        raise OptionError("no MODEL to score")
    device, said = choose_device(options.device), set[str]()
    asked, options = options, options.on(device.type)

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    skeletons = [open_skeleton(one.source, one.tensors.index, options, device, once) for one in candidates]
    dtypes = {str(skeleton.dtype).removeprefix("torch.") for skeleton in skeletons}
    if len(dtypes) > 1:
        say(f"computing in {' and '.join(sorted(dtypes))}, as the checkpoints are stored; --dtype makes them alike")
    tokenizers = [_tokenizer(one, options) for one in candidates]
    sets = _sets(candidates, tokenizers, prompts, options, say)
    of_each = [tuple(sample for one in own for sample in one.samples) for own in sets]
    needs = [_Need(*both, device, len(candidates) - 1) for both in zip(skeletons, of_each, strict=True)]
    if asked.batch_tokens is None and not all(need.fits(options) for need in needs):
        options = replace(options, batch_tokens=LEAST_BATCH)
    models = []
    for candidate, skeleton, own, samples, need in zip(candidates, skeletons, sets, of_each, needs, strict=True):
        check_fit(candidate.source, skeleton, samples)
        groups = need.groups(options, once)
        models.append(Model(candidate=candidate, skeleton=skeleton, sets=own, samples=samples, groups=groups))
    for one in sets[0]:
        say(f"{one.name}: {one.prompts.report.line()}")
    return Prepared(models=tuple(models), tokenizer=tokenizers[0], device=device, options=options)


def _tokenizer(candidate: Candidate, options: ScoreOptions) -> Any:
    return load_tokenizer(folder_of(candidate.source), trust_remote_code=options.trust_remote_code)


def _sets(
    candidates: Sequence[Candidate],
    tokenizers: Sequence[Any],
    prompts: Mapping[str, PromptSource],
    options: ScoreOptions,
    say: Say,
) -> list[tuple[ScoredSet, ...]]:
    """Read the prompts for every checkpoint: once, where tokenizers are the same."""
    first = tokenizers[0]
    hashed, template = hash_tokenizer(first), getattr(first, "chat_template", None)
    sets = [load_sets(prompts, first, options, say)]
    templated = any(one.prompts.report.chat_template for one in sets[0])
    for candidate, tokenizer in zip(candidates[1:], tokenizers[1:], strict=True):
        if hash_tokenizer(tokenizer) != hashed:
            if options.by_bytes:
                if any(one.prompts.report.kind == "windows" for one in sets[0]):
                    raise OptionError("--by-bytes: windows of two tokenizers hold other text; leave --window out")
                sets.append(load_sets(prompts, tokenizer, options, lambda line: None))
                continue
            _check_alike(candidates[0], candidate, sets[0], load_alike(prompts, tokenizer, template, options))
        if templated and getattr(tokenizer, "chat_template", None) != template:
            say(f"{candidate.name}: has another chat template; prompts are rendered with that of {candidates[0].name}")
        sets.append(sets[0])
    return sets


def _check_alike(
    first: Candidate, other: Candidate, sets: Sequence[ScoredSet], others: Sequence[ScoredSet] | None
) -> None:
    """Refuse a tokenizer that splits these prompts otherwise; what else differs in its files is no matter."""
    where = "the prompts" if others is None else first_difference(sets, others)
    if where is not None:
        raise CheckpointError(
            f"{first.name} and {other.name} have different tokenizers ({where}): losses per token are not comparable; "
            "--by-bytes compares bits per byte"
        )


class _Need(NamedTuple):
    """What decides how much memory the forward of a model takes."""

    skeleton: Skeleton
    samples: Sequence[Sample]
    device: torch.device
    others: int

    def fits(self, options: ScoreOptions) -> bool:
        """Return whether one block at a time fits the memory."""
        return forward_bytes(self.skeleton, 1, **self._load(options)) <= HEADROOM * available_bytes(self.device)

    def groups(self, options: ScoreOptions, say: Say) -> tuple[tuple[int, ...], ...]:
        """Choose groups of blocks; a group size that would not fit the memory is lowered, and said."""
        room = available_bytes(self.device)
        groups = fit_forward(self.skeleton, options.group_size, room, **self._load(options))
        asked = min(options.group_size, len(self.skeleton.blocks))
        if len(groups[0]) < asked:
            say(f"group size lowered from {asked} to {len(groups[0])}: more would not fit the memory")
        return groups

    def _load(self, options: ScoreOptions) -> dict[str, Any]:
        return {
            "batch_tokens": options.tokens_per_batch,
            "longest": max(len(sample.ids) for sample in self.samples),
            "others": self.others,
            "on_host": self.device.type == "cpu",
        }
