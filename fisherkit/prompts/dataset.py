"""Prompt sets: from rows to samples of token ids.

A *row* is a dict of fields, a *sample* a row's token ids with a mark on each token that counts in the loss. Rows come
from ``rows`` and are read no further than ``limit``; what a row's fields mean and how they become text is in ``chat``.
In messages, rows count from 1, as editors do. This module knows no tensors.
"""

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fisherkit.errors import OptionError, PromptError
from fisherkit.options import PromptOptions
from fisherkit.prompts.fields import Conversation, PromptFields, Row, detect_fields
from fisherkit.prompts.readers import counted, read_rows
from fisherkit.prompts.templates import Render, Rendered, render_chat, render_plain, template_of
from fisherkit.prompts.tokenise import tokenise

_OWN_KWARGS = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"}


@dataclass(frozen=True)
class Sample:
    """One row as the model sees it.

    Attributes:
        row: the row in its source, from 0.
        ids: token ids.
        counts: for each token, whether the loss of predicting it from those before it counts; the first never does.
    """

    row: int
    ids: tuple[int, ...]
    counts: tuple[bool, ...]

    @property
    def loss_tokens(self) -> int:
        """How many tokens count."""
        return sum(self.counts)


@dataclass(frozen=True)
class PromptReport:
    """How a prompt set was read: what goes into an artefact's provenance.

    Attributes:
        source: as given.
        kind: what the first row's fields were taken for, e.g. ``prompt``, ``text``, ``messages``.
        field: the fields that were read, e.g. ``prompt+completion``.
        rows: rows read, skipped ones included.
        samples: rows that became samples.
        tokens: tokens of all samples.
        loss_tokens: those that count.
        skipped: rows that did not become samples.
        skipped_because: their number by reason.
        truncated: samples cut at ``max_length``.
        folded_system: samples whose system turn went into the first user turn, because the template refuses it.
        realigned: samples with a span found in a rendering that rewrites earlier turns (dropped thoughts).
        chat_template: whether the chat template was used.
        loss: which tokens count: ``all``, ``completion`` or ``assistant``.
        max_length: the longest sample allowed, in tokens.
        sha256: over ids and counts of all samples, in order.
        template_sha256: of the chat template; None where none was used.
        chat_template_kwargs: extra variables of the template.
        rows_used: the samples' rows from 0, as ranges: ``0-16,18-199``.
    """

    source: str
    kind: str
    field: str
    rows: int
    samples: int
    tokens: int
    loss_tokens: int
    skipped: int
    skipped_because: dict[str, int]
    truncated: int
    folded_system: int
    realigned: int
    chat_template: bool
    loss: str
    max_length: int
    sha256: str
    template_sha256: str | None
    chat_template_kwargs: dict[str, Any]
    rows_used: str

    def line(self) -> str:
        """All of it that a person wants to know before a long run, in one line."""
        parts = [
            counted(self.rows, "prompt"),
            f"field {self.field}",
            f"chat template {'on' if self.chat_template else 'off'}",
            f"{self.truncated:,} truncated",
            f"{self.skipped:,} skipped",
            counted(self.loss_tokens, "loss token"),
        ]
        if self.folded_system:
            parts.append(counted(self.folded_system, "system turn") + " folded in")
        if self.realigned:
            parts.append(f"{self.realigned:,} realigned")
        return ", ".join(parts)


@dataclass(frozen=True)
class PromptSet:
    """Samples in the order of their rows, and how they were read."""

    samples: tuple[Sample, ...]
    report: PromptReport


def load_prompts(source: str | os.PathLike[str], tokenizer: Any, options: PromptOptions) -> PromptSet:
    """Read a prompt set and tokenise it.

    Args:
        source: a .txt, .jsonl, .json, .csv, .tsv or .parquet file; ``-`` for stdin; ``builtin``; or a data set of
            the hub, ``org/name[:split][@revision]``.
        tokenizer: a tokenizer of transformers.
        options: which rows and fields, the chat template, the loss, the greatest length.

    Raises:
        PromptError: the set cannot be read, or no token of it would count.
        MissingLibraryError: parquet and the hub need ``datasets``.
        OptionError: ``chat_template_kwargs`` sets what is not the caller's to set.
    """
    source = os.fspath(source)
    name = "stdin" if source == "-" else source
    rows = list(islice(read_rows(source), options.limit))
    if not rows:
        raise PromptError(f"{name}: no prompts in it")
    fields = detect_fields(rows[0], options.field, f"{name} row 1")
    conversations = [fields.read(row, f"{name} row {n}") for n, row in enumerate(rows, 1)]
    loss, template = _pick_loss(name, fields, conversations, options), _pick_template(conversations, tokenizer, options)
    reader = _Reader(name, tokenizer, options, loss, template)
    samples = tuple(filter(None, (reader.sample(n, conversation) for n, conversation in enumerate(conversations))))
    if not samples:
        raise PromptError(_nothing_left(name, reader))
    return PromptSet(samples, _report(source, fields, rows, samples, reader))


def batches(samples: Sequence[Sample], batch_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Indices of samples that share a batch: of similar length, shortest first, ties in their own order.

    A batch's padded size, its number of samples times its longest, is at most ``batch_tokens``; a longer sample is a
    batch of its own.
    """
    packed: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i].ids)):
        if packed and (len(packed[-1]) + 1) * len(samples[index].ids) <= batch_tokens:
            packed[-1].append(index)
        else:
            packed.append([index])
    return tuple(map(tuple, packed))


# From rows to samples.


def _pick_loss(name: str, fields: PromptFields, conversations: Sequence[Conversation], options: PromptOptions) -> str:
    """``auto`` resolved; a loss on answers needs a set that has some."""
    if options.loss == "auto":
        first = next((conversation for conversation in conversations if not conversation.empty), conversations[0])
        return "completion" if first.answered else "all"
    spoken = any(turn["role"] == "assistant" for conversation in conversations for turn in conversation.turns)
    if options.loss != "all" and not spoken:
        raise PromptError(
            f"{name}: no loss token anywhere: --loss {options.loss} counts answers, and the set has prompts only "
            f"(field {fields.field}); use --loss all"
        )
    return options.loss


def _pick_template(conversations: Sequence[Conversation], tokenizer: Any, options: PromptOptions) -> Render | None:
    """The template to render with; ``auto`` leaves raw text alone."""
    own = sorted(_OWN_KWARGS & options.chat_template_kwargs.keys())
    if own:
        raise OptionError(f"--chat-template-kwargs must not set {own[0]!r}: that is decided per prompt")
    exists = bool(getattr(tokenizer, "chat_template", None) or options.chat_template_kwargs.get("chat_template"))
    if options.chat_template == "on" and not exists:
        raise PromptError("--chat-template on, but the tokenizer has no chat template; use auto or off")
    if not exists or options.chat_template == "off" or (options.chat_template == "auto" and conversations[0].raw):
        return None
    return template_of(tokenizer, options.chat_template_kwargs)


class _Reader:
    """Turns talks into samples and keeps count of what happened to them."""

    def __init__(self, name: str, tokenizer: Any, options: PromptOptions, loss: str, template: Render | None) -> None:
        self.name, self.tokenizer, self.options, self.loss, self.template = name, tokenizer, options, loss, template
        self.skipped: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def sample(self, row: int, conversation: Conversation) -> Sample | None:
        """The row's sample, or None if it is skipped."""
        made = "empty" if conversation.empty else self._make(row, conversation)
        if isinstance(made, Sample):
            return made
        self.skipped[made] += 1
        return None

    def _make(self, row: int, conversation: Conversation) -> Sample | str:
        """The sample, or the reason why there is none."""
        rendered = self._render(conversation, f"{self.name} row {row + 1}")
        if rendered.spans is None:
            return "answer not found in the rendered template"
        ids, counts = tokenise(self.tokenizer, rendered, everything=self.loss == "all")
        longest = self.options.max_length
        if not any(counts[:longest]):
            return "cut off before the first loss token" if any(counts) else "without a loss token"
        self.seen.update(truncated=len(ids) > longest, folded=rendered.folded, realigned=rendered.realigned)
        return Sample(row, ids[:longest], counts[:longest])

    def _render(self, conversation: Conversation, where: str) -> Rendered:
        if self.template is None:
            rendered = render_plain(conversation, self.loss)
        else:
            rendered = render_chat(conversation, self.loss, self.template, where)
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            broken = rendered.text[error.start]
            raise PromptError(f"{where}: holds {broken!r}, half of a surrogate pair, which is no character") from None
        return rendered


def _nothing_left(name: str, reader: _Reader) -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in reader.skipped.items())
    return (
        f"{name}: no sample left of {counted(reader.skipped.total(), 'row')} ({reasons}); "
        f"raise --max-length (now {reader.options.max_length}) or use --loss all (now {reader.loss})"
    )


def _report(
    source: str, fields: PromptFields, rows: Sequence[Row], samples: Sequence[Sample], reader: _Reader
) -> PromptReport:
    return PromptReport(
        source=source,
        kind=fields.kind,
        field=fields.field,
        rows=len(rows),
        samples=len(samples),
        tokens=sum(len(sample.ids) for sample in samples),
        loss_tokens=sum(sample.loss_tokens for sample in samples),
        skipped=reader.skipped.total(),
        skipped_because=dict(reader.skipped),
        truncated=reader.seen["truncated"],
        folded_system=reader.seen["folded"],
        realigned=reader.seen["realigned"],
        chat_template=reader.template is not None,
        loss=reader.loss,
        max_length=reader.options.max_length,
        sha256=_hash_samples(samples),
        template_sha256=_hash_template(reader) if reader.template else None,
        chat_template_kwargs=dict(reader.options.chat_template_kwargs),
        rows_used=_ranges([sample.row for sample in samples]),
    )


def _hash_samples(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(struct.pack(f"<I{len(sample.ids)}I", len(sample.ids), *sample.ids) + bytes(sample.counts))
    return digest.hexdigest()


def _hash_template(reader: _Reader) -> str:
    template = reader.options.chat_template_kwargs.get("chat_template") or reader.tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2,5"``; numbers ascend."""
    starts = [n for n, before in zip(numbers, [None, *numbers], strict=False) if before is None or n != before + 1]
    ends = [n for n, after in zip(numbers, [*numbers[1:], None], strict=True) if after is None or after != n + 1]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))
