"""Prompt sets: from rows to samples of token ids.

A *row* is a dict of columns, a *sample* a row's token ids with a mark on each token that counts in the loss. Rows come
from ``sources`` and are read no further than ``limit``; what a row's columns mean is in ``fields``, how turns become
text in ``templates``. In messages, rows count from 1, as editors do. This module knows no tensors.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fisherkit.errors import OptionError, PromptError, first_line
from fisherkit.options import PromptOptions
from fisherkit.progress import Say
from fisherkit.prompts.fields import PromptFields
from fisherkit.prompts.known_sets import detect_fields, unused_answer
from fisherkit.prompts.report import PromptReport, hash_samples, ranges
from fisherkit.prompts.sources import NamedRow, PromptSource, read_rows, source_name
from fisherkit.prompts.templates import ChatTemplate, Rendered, render_plain
from fisherkit.prompts.tokenise import tokenise
from fisherkit.prompts.turns import Conversation, UnusableRowError
from fisherkit.prompts.wording import clipped, counted, reasons_of

_OWN_KWARGS = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"}
_REASONS = 8  # that are counted by themselves; a template may give each row one of its own


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
        """Number of tokens that count."""
        return sum(self.counts)


@dataclass(frozen=True)
class PromptSet:
    """Samples in the order of their rows, and how they were read."""

    samples: tuple[Sample, ...]
    report: PromptReport


def load_prompts(
    source: PromptSource, tokenizer: Any, options: PromptOptions, *, say: Say = lambda line: None
) -> PromptSet:
    """Read a prompt set and tokenise it.

    Args:
        source: a file, folder, pattern, data set of the hub, ``-`` for stdin, ``builtin``, or several of these; see
            ``read_rows``.
        tokenizer: a tokenizer of transformers.
        options: which rows and fields, the chat template, the loss, the greatest length.
        say: called about columns that look like an answer and are not read.

    Raises:
        PromptError: the set cannot be read, or no token of it would count.
        MissingLibraryError: parquet and the hub need ``datasets``.
        OptionError: ``chat_template_kwargs`` sets what is not the caller's to set.
    """
    name = "stdin" if source_name(source) == "-" else clipped(source_name(source), 150)
    rows = list(islice(read_rows(source), None if options.limit is None else min(options.limit, sys.maxsize)))
    if not rows:
        raise PromptError(f"{name}: no prompts in it")
    fields = detect_fields(rows[0][1], options.field, rows[0][0])
    conversations = [fields.read(row, where) for where, row in rows]
    remark = unused_answer(fields, rows, conversations) if options.field is None else None
    if remark is not None:
        say(remark)
    loss, template = _pick_loss(name, fields, conversations, options), _pick_template(conversations, tokenizer, options)
    reader = _Reader(rows, fields.field, tokenizer, options, loss, template)
    samples = tuple(filter(None, (reader.sample(n, conversation) for n, conversation in enumerate(conversations))))
    if not samples:
        raise PromptError(_nothing_left(name, reader))
    return PromptSet(samples, _report(source_name(source), fields, conversations, samples, reader))


def batches(samples: Sequence[Sample], batch_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Return the indices of samples that share a batch: of similar length, shortest first, ties in their own order.

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
    """Resolve ``auto``; a loss on answers needs a set that has some."""
    if options.loss == "auto":
        usable = (conversation for conversation in conversations if not (conversation.empty or conversation.unusable))
        return "completion" if next(usable, conversations[0]).answered else "all"
    spoken = any(turn["role"] == "assistant" for conversation in conversations for turn in conversation.turns)
    if options.loss != "all" and not spoken:
        raise PromptError(
            f"{name}: no loss token anywhere: --loss {options.loss} counts answers, and the set has prompts only "
            f"(field {clipped(fields.field, 60)}); use --loss all"
        )
    return options.loss


def _pick_template(
    conversations: Sequence[Conversation], tokenizer: Any, options: PromptOptions
) -> ChatTemplate | None:
    """Return the template to render with; ``auto`` leaves raw text alone."""
    own = sorted(_OWN_KWARGS & options.chat_template_kwargs.keys())
    if own:
        raise OptionError(f"--chat-template-kwargs must not set {own[0]!r}: that is decided per prompt")
    exists = bool(getattr(tokenizer, "chat_template", None) or options.chat_template_kwargs.get("chat_template"))
    if options.chat_template == "on" and not exists:
        raise PromptError("--chat-template on, but the tokenizer has no chat template; use auto or off")
    if not exists or options.chat_template == "off" or (options.chat_template == "auto" and conversations[0].raw):
        return None
    return ChatTemplate(tokenizer, options.chat_template_kwargs)


class _Reader:
    """Turns conversations into samples and keeps count of what happened to them."""

    def __init__(
        self,
        rows: Sequence[NamedRow],
        field: str,
        tokenizer: Any,
        options: PromptOptions,
        loss: str,
        template: ChatTemplate | None,
    ) -> None:
        self.rows, self.field = rows, field
        self.tokenizer, self.options, self.loss, self.template = tokenizer, options, loss, template
        self.skipped: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def sample(self, row: int, conversation: Conversation) -> Sample | None:
        """Return the row's sample, or None if it is skipped."""
        try:
            return self._make(row, conversation)
        except UnusableRowError as error:
            reason = str(error)
            known = reason in self.skipped or len(self.skipped) < _REASONS
            self.skipped[reason if known else "for other reasons"] += 1
            return None

    def _make(self, row: int, conversation: Conversation) -> Sample:
        if conversation.unusable or conversation.empty:
            raise UnusableRowError(conversation.unusable or "empty")
        rendered = self._render(conversation, self.rows[row][0])
        if rendered.spans is None:
            raise UnusableRowError("answer not found in the rendered template")
        longest, everything = self.options.max_length, self.loss == "all"
        ids, counts = self._tokenise(rendered, everything, longest)
        if not any(counts[:longest]):
            beyond = len(ids) > longest and (everything or rendered.spans)
            raise UnusableRowError("cut off before the first loss token" if beyond else "without a loss token")
        self.seen.update(
            truncated=len(ids) > longest,
            folded=rendered.folded,
            realigned=rendered.realigned,
            dropped=conversation.dropped,
        )
        return Sample(row, ids[:longest], counts[:longest])

    def _render(self, conversation: Conversation, where: str) -> Rendered:
        try:
            rendered = (self.template.render if self.template else render_plain)(conversation, self.loss)
            rendered.text.encode()
        except UnusableRowError:
            raise
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from None
        except UnicodeEncodeError as error:
            broken = error.object[error.start]
            raise PromptError(f"{where}: holds {broken!r}, half of a surrogate pair, which is no character") from None
        return rendered

    def _tokenise(self, rendered: Rendered, everything: bool, longest: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        try:
            return tokenise(self.tokenizer, rendered, everything=everything, longest=longest)
        except Exception as error:  # what a tokenizer does, and how it fails, its files decide
            reason = clipped(first_line(error), 120)
            raise PromptError(f"the tokenizer fails: {reason}; are its files whole?") from error


def _nothing_left(name: str, reader: _Reader) -> str:
    """Say why there is no sample, and what to do about the commonest reason."""
    reason = max(reader.skipped, key=lambda reason: reader.skipped[reason])
    if "chat template" in reason:
        advice = "use --chat-template off, or prompts of the form that it takes"
    elif "loss token" in reason or "not found" in reason:
        advice = f"raise --max-length (now {reader.options.max_length}) or use --loss all (now {reader.loss})"
    else:
        advice = f"is {clipped(reader.field, 60)} the right --field?"
    return (
        f"{name}: no sample left of {counted(reader.skipped.total(), 'row')} ({reasons_of(reader.skipped)}); {advice}"
    )


def _report(
    source: str,
    fields: PromptFields,
    conversations: Sequence[Conversation],
    samples: Sequence[Sample],
    reader: _Reader,
) -> PromptReport:
    return PromptReport(
        source=source,
        kind=fields.kind,
        field=fields.field,
        rows=len(conversations),
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
        sha256=hash_samples((sample.ids, sample.counts) for sample in samples),
        template_sha256=reader.template.sha256 if reader.template else None,
        chat_template_kwargs=dict(reader.options.chat_template_kwargs),
        rows_used=ranges([sample.row for sample in samples]),
        dropped_turns=reader.seen["dropped"],
    )
