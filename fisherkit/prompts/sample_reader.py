"""From conversations to samples: which loss, which template, which tokens count, and what happened to each row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fisherkit.errors import OptionError, PromptError, first_line
from fisherkit.options import PromptOptions
from fisherkit.prompts.fields import PromptFields
from fisherkit.prompts.report import PromptReport, hash_samples, ranges
from fisherkit.prompts.sources import NamedRow, PromptSource, short_name, source_name
from fisherkit.prompts.templates import ChatTemplate, Rendered, render_plain
from fisherkit.prompts.tokenise import Tokens, tokenise
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
        text_bytes: bytes in UTF-8 of the text of the tokens that count.
    """

    row: int
    ids: tuple[int, ...]
    counts: tuple[bool, ...]
    text_bytes: int = 0

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that count."""
        return sum(self.counts)


def _pick_loss(name: str, fields: PromptFields, conversations: Sequence[Conversation], options: PromptOptions) -> str:
    """Resolve ``auto``; a loss on answers needs a set that has some."""
    usable = [conversation for conversation in conversations if not (conversation.empty or conversation.unusable)]
    if options.loss == "auto":
        return "completion" if (usable or conversations)[0].answered else "all"
    spoken = any(turn["role"] == "assistant" for conversation in usable for turn in conversation.turns)
    if options.loss != "all" and usable and not spoken:  # why none is usable, the rows say better
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


class SampleReader:
    """Turns conversations into samples and keeps count of what happened to them.

    Args:
        source: of the rows, for messages and the report.
        rows: with their names.
        fields: what their columns mean.
        conversations: what the rows say, one for each.
        tokenizer: of transformers.
        options: the template, the loss, the greatest length.

    Raises:
        PromptError: no token would count, or a template is asked for that is not there.
        OptionError: ``chat_template_kwargs`` sets what is not the caller's to set.
    """

    def __init__(
        self,
        source: PromptSource,
        rows: Sequence[NamedRow],
        fields: PromptFields,
        conversations: Sequence[Conversation],
        tokenizer: Any,
        options: PromptOptions,
    ) -> None:
        self._source, self._rows, self._fields, self._conversations = source, rows, fields, conversations
        self._tokenizer, self._options = tokenizer, options
        self._loss = _pick_loss(short_name(source), fields, conversations, options)
        self._template = _pick_template(conversations, tokenizer, options)
        self._skipped: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()

    def sample(self, row: int) -> Sample | None:
        """Return a row's sample, or None if it is skipped."""
        try:
            return self._make(row, self._conversations[row])
        except UnusableRowError as error:
            reason = str(error)
            known = reason in self._skipped or len(self._skipped) < _REASONS
            self._skipped[reason if known else "for other reasons"] += 1
            return None

    def report(self, samples: Sequence[Sample]) -> PromptReport:
        """Return how the rows were read.

        Args:
            samples: that were made of them.

        Raises:
            PromptError: there are none.
        """
        if not samples:
            raise PromptError(self._nothing_left())
        return PromptReport(
            source=source_name(self._source),
            kind=self._fields.kind,
            field=self._fields.field,
            rows=len(self._conversations),
            samples=len(samples),
            tokens=sum(len(sample.ids) for sample in samples),
            loss_tokens=sum(sample.loss_tokens for sample in samples),
            skipped=self._skipped.total(),
            skipped_because=dict(self._skipped),
            truncated=self._seen["truncated"],
            folded_system=self._seen["folded"],
            realigned=self._seen["realigned"],
            chat_template=self._template is not None,
            loss=self._loss,
            max_length=self._options.max_length,
            sha256=hash_samples((sample.ids, sample.counts) for sample in samples),
            template_sha256=self._template.sha256 if self._template else None,
            chat_template_kwargs=dict(self._options.chat_template_kwargs),
            rows_used=ranges([sample.row for sample in samples]),
            dropped_turns=self._seen["dropped"],
        )

    def _nothing_left(self) -> str:
        """Say why there is no sample, and what to do about the commonest reason."""
        reason = max(self._skipped, key=lambda reason: self._skipped[reason])
        if "chat template" in reason:
            advice = "use --chat-template off, or prompts of the form that it takes"
        elif "loss token" in reason or "not found" in reason:
            advice = f"raise --max-length (now {self._options.max_length}) or use --loss all (now {self._loss})"
        else:
            advice = f"is {clipped(self._fields.field, 60)} the right --field?"
        return (
            f"{short_name(self._source)}: no sample left of {counted(self._skipped.total(), 'row')} "
            f"({reasons_of(self._skipped)}); {advice}"
        )

    def _make(self, row: int, conversation: Conversation) -> Sample:
        if conversation.unusable or conversation.empty:
            raise UnusableRowError(conversation.unusable or "empty")
        rendered = self._render(conversation, self._rows[row][0])
        if rendered.spans is None:
            raise UnusableRowError("answer not found in the rendered template")
        longest, everything = self._options.max_length, self._loss == "all"
        tokens = self._tokenise(rendered, everything, longest)
        kept = tokens.head(longest)
        if not any(kept.counts):
            beyond = len(tokens.ids) > longest and (everything or rendered.spans)
            raise UnusableRowError("cut off before the first loss token" if beyond else "without a loss token")
        self._seen.update(
            truncated=len(tokens.ids) > longest,
            folded=rendered.folded,
            realigned=rendered.realigned,
            dropped=conversation.dropped,
        )
        return Sample(row, kept.ids, kept.counts, kept.counted_bytes(rendered.text, self._tokenizer))

    def _render(self, conversation: Conversation, where: str) -> Rendered:
        try:
            rendered = (self._template.render if self._template else render_plain)(conversation, self._loss)
            rendered.text.encode()
        except UnusableRowError:
            raise
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from None
        except UnicodeEncodeError as error:
            broken = error.object[error.start]
            raise PromptError(f"{where}: holds {broken!r}, half of a surrogate pair, which is no character") from None
        return rendered

    def _tokenise(self, rendered: Rendered, everything: bool, longest: int) -> Tokens:
        try:
            return tokenise(self._tokenizer, rendered, everything=everything, longest=longest)
        except Exception as error:  # what a tokenizer does, and how it fails, its files decide
            reason = clipped(first_line(error), 120)
            raise PromptError(f"the tokenizer fails: {reason}; are its files whole?") from error
