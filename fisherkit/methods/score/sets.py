"""Prompt sets as they are scored, and whether two tokenizers make the same of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fisherkit.errors import OptionError, PromptError
from fisherkit.options import ScoreOptions
from fisherkit.progress import Say
from fisherkit.prompts.choices import Question, load_choices
from fisherkit.prompts.dataset import PromptSet, Sample, load_prompts, read_first
from fisherkit.prompts.sources import PromptSource, source_names
from fisherkit.prompts.windows import is_plain_text, load_windows


@dataclass(frozen=True)
class ScoredSet:
    """One prompt set.

    Attributes:
        name: as the user calls it.
        prompts: samples; of multiple choice one for every choice.
        questions: of multiple choice; empty for any other set.
    """

    name: str
    prompts: PromptSet
    questions: tuple[Question, ...] = ()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Every sample that is run."""
        return self.prompts.samples

    @property
    def scored(self) -> tuple[int, ...]:
        """Numbers of the samples whose losses make the set's: all, or the right choices."""
        if self.questions:
            return tuple(question.samples[question.right] for question in self.questions)
        return tuple(range(len(self.samples)))


def load_sets(
    prompts: Mapping[str, PromptSource], tokenizer: Any, options: ScoreOptions, say: Say
) -> tuple[ScoredSet, ...]:
    """Read every prompt set: as multiple choice, as plain text in windows, or as prompts like any other command.

    Args:
        prompts: sources by name.
        tokenizer: of transformers.
        options: how they are read.
        say: gets lines for a person.

    Raises:
        OptionError: no set, or none of the kind that ``--window`` or ``--choices`` is for.
        PromptError: a set cannot be read, or has nothing to score; the message names the file.
    """
    if not prompts:
        raise OptionError("no prompts to score on: --prompts NAME=FILE")
    stdin = [name for name, source in prompts.items() if "-" in source_names(source)]
    if len(stdin) > 1 or (stdin and (options.window or options.choices or options.by_bytes)):
        raise OptionError("--prompts -: stdin can be read once only; save it as a file")
    sets = tuple(_load(name, source, tokenizer, options, say) for name, source in prompts.items())
    if options.window is not None and not any(one.prompts.report.kind == "windows" for one in sets):
        raise OptionError("--window: no prompt set is plain text (a .txt file, or rows with a text column)")
    if options.choices is not None and not any(one.questions for one in sets):
        raise OptionError(f"--choices {options.choices}: no prompt set has that column")
    return sets


def _load(name: str, source: PromptSource, tokenizer: Any, options: ScoreOptions, say: Say) -> ScoredSet:
    def remark(line: str) -> None:
        say(f"{name}: {line}")

    if options.window is not None and is_plain_text(source, options.field):
        return ScoredSet(name, load_windows(source, options.window, tokenizer, options))
    if options.choices is not None and options.choices in read_first(source, 1)[0][1]:
        return ScoredSet(name, *load_choices(source, options.choices, tokenizer, options))
    return ScoredSet(name, load_prompts(source, tokenizer, options, say=remark))


def first_difference(sets: Sequence[ScoredSet], others: Sequence[ScoredSet]) -> str | None:
    """Return the first row that two tokenizers made other tokens of, or other tokens count; None if there is none."""
    for one, other in zip(sets, others, strict=True):
        if one.samples == other.samples:
            continue
        pairs = zip(one.samples, other.samples, strict=False)
        row = next((sample.row for sample, twin in pairs if sample != twin), None)
        return f"{one.name}, row {row + 1}" if row is not None else one.name
    return None


def load_alike(
    prompts: Mapping[str, PromptSource], tokenizer: Any, template: Any, options: ScoreOptions
) -> tuple[ScoredSet, ...] | None:
    """Read the sets with another tokenizer but a given chat template, so that only tokens can differ.

    Args:
        prompts: sources by name.
        tokenizer: the other one.
        template: of the first tokenizer; None where it has none.
        options: how they are read.

    Returns:
        The sets; None where this tokenizer cannot read them at all.
    """
    kwargs = dict(options.chat_template_kwargs)
    if template is not None:
        kwargs.setdefault("chat_template", template)
    elif "chat_template" not in kwargs:
        options = replace(options, chat_template="off")
    try:
        return load_sets(prompts, tokenizer, replace(options, chat_template_kwargs=kwargs), lambda line: None)
    except PromptError:
        return None
