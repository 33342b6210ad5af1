"""From a row's fields to turns, from turns to text, from text to token ids with marks on the tokens that count.

A *talk* is a list of turns ``{"role": ..., "content": ...}``, as chat templates take them. A *span* is a pair of
character positions ``(start, end)`` in rendered text. Knows nothing of files and nothing of tensors.

Stock chat templates don't mark what the assistant said, so spans are found by rendering prefixes: what the template
makes of ``turns[:i]`` with a generation prompt ends where turn ``i`` begins, what it makes of ``turns[:i+1]`` ends
where it ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fisherkit.errors import PromptError, first_line

Turn = dict[str, Any]
Row = dict[str, Any]
Span = tuple[int, int]
Render = Callable[[Sequence[Turn], bool], str]  # turns, and whether the assistant is to speak next

_TYPE_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
_SHAREGPT_KEYS = {"from": "role", "value": "content"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Talk:
    """One row as turns.

    Attributes:
        turns: what is said, in order.
        raw: a text to be continued, not a turn of a chat (kept as one user turn, for ``--chat-template on``).
        glue: what stands between turns when there is no chat template.
    """

    turns: tuple[Turn, ...]
    raw: bool = False
    glue: str = "\n\n"

    @property
    def answered(self) -> bool:
        """Whether the assistant has the last word."""
        return bool(self.turns) and self.turns[-1]["role"] == "assistant"

    @property
    def empty(self) -> bool:
        """Whether the question or the last turn is blank (a blank system turn is common and harmless)."""
        spoken = [turn for turn in self.turns if turn["role"] != "system"]
        return not spoken or _is_blank(spoken[0]) or _is_blank(spoken[-1])


@dataclass(frozen=True)
class Layout:
    """Which fields of a row hold what.

    Attributes:
        kind: the name of the layout, e.g. ``prompt+completion``.
        ask: the field with the prompt, the text or the messages.
        answer: the field with the assistant's answer.
        context: a field whose text follows the prompt after a blank line; may be empty or absent (Alpaca's ``input``).
    """

    kind: str
    ask: str
    answer: str | None = None
    context: str | None = None

    @property
    def field(self) -> str:
        """The fields that are read, e.g. ``instruction+input+output``."""
        return "+".join(name for name in (self.ask, self.context, self.answer) if name)

    def read(self, row: Row, where: str) -> Talk:
        """Turn a row into a talk; ``where`` names the row in a PromptError."""
        asked = _value(row, self.ask, where)
        if isinstance(asked, str):
            return self._read_text(row, asked, where)
        turns = _turns(asked, self.ask, where)
        return Talk(self._with_answer(turns, row, where))

    def _read_text(self, row: Row, asked: str, where: str) -> Talk:
        if self.kind in ("messages", "conversations"):
            raise PromptError(f"{where}: field {self.ask!r} is text, not a list of messages")
        context = row.get(self.context) if self.context else None
        if context and isinstance(context, str):
            asked = f"{asked}\n\n{context}"
        turns = self._with_answer(({"role": "user", "content": asked},), row, where)
        exact = self.ask == "prompt" and self.answer is not None and isinstance(row[self.answer], str)
        return Talk(turns, raw=self.kind in ("text", "chosen"), glue="" if exact else "\n\n")

    def _with_answer(self, asked: tuple[Turn, ...], row: Row, where: str) -> tuple[Turn, ...]:
        if self.answer is None:
            return asked
        answer = _value(row, self.answer, where)
        if isinstance(answer, str):
            return (*asked, {"role": "assistant", "content": answer})
        turns = _turns(answer, self.answer, where)
        # Preference sets often repeat the prompt in the answer's messages.
        return turns if turns and turns[0]["role"] in ("system", "user") else asked + turns


# In order of preference: what says more comes first, so that Alpaca's rendered ``text`` and UltraChat's
# ``prompt`` do not win over the fields they were made from.
_LAYOUTS = (
    Layout("prompt+completion", "prompt", "completion"),
    Layout("messages", "messages"),
    Layout("conversations", "conversations"),
    Layout("prompt+chosen", "prompt", "chosen"),
    Layout("instruction+output", "instruction", "output", "input"),
    Layout("instruction", "instruction", None, "input"),
    Layout("question+answer", "question", "answer"),
    Layout("prompt", "prompt"),
    Layout("text", "text"),
    Layout("chosen", "chosen"),
)


def detect_layout(row: Row, field: str | None, where: str) -> Layout:
    """Find out what the fields of the first row mean; ``field`` names the one to read instead.

    Raises:
        PromptError: the row has no field that is known, or not the one asked for.
    """
    if field is not None:
        return _named_layout(row, field, where)
    for layout in _LAYOUTS:
        if layout.ask in row and (layout.answer is None or layout.answer in row):
            return layout if layout.context in row else replace(layout, context=None)
    raise PromptError(
        f"{where}: none of its fields is known (it has: {_names(row)}); name the one to read with --field, "
        "or call it prompt, text or messages"
    )


def _named_layout(row: Row, field: str, where: str) -> Layout:
    value = _value(row, field, where)
    if isinstance(value, str):
        return Layout("text" if field == "text" else "prompt", field)
    return Layout("conversations" if field == "conversations" else "messages", field)


def _value(row: Row, field: str, where: str) -> Any:
    if field not in row:
        raise PromptError(f"{where}: no field {field!r} (it has: {_names(row)})")
    value = row[field]
    if not isinstance(value, str | list):
        raise PromptError(f"{where}: field {field!r} is {_type_name(value)}, not text and not a list of messages")
    return value


def _names(row: Row) -> str:
    return ", ".join(map(str, row)) or "nothing"


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def _turns(messages: list[Any], field: str, where: str) -> tuple[Turn, ...]:
    return tuple(_turn(message, f"{where}: field {field!r}, message {n}") for n, message in enumerate(messages, 1))


def _turn(message: Any, where: str) -> Turn:
    """A message as templates take it; also ShareGPT's ``{"from": "human", "value": ...}``."""
    if not isinstance(message, dict):
        raise PromptError(f"{where} is {_type_name(message)}, not an object with role and content")
    # Column stores fill the keys that a message lacks with null, and templates take null for a tool call.
    turn: Turn = {str(_SHAREGPT_KEYS.get(key, key)): value for key, value in message.items() if value is not None}
    if not isinstance(turn.get("role"), str):
        raise PromptError(f"{where} has no role (it has: {_names(message)})")
    if not isinstance(turn.setdefault("content", ""), str | list):
        raise PromptError(f"{where}: its content is {_type_name(turn['content'])}, not text")
    return {**turn, "role": _SHAREGPT_ROLES.get(turn["role"], turn["role"])}


def _is_blank(turn: Turn) -> bool:
    content = turn["content"]
    return not (content.strip() if isinstance(content, str) else content) and not turn.get("tool_calls")


# Rendering: turns to text.


@dataclass(frozen=True)
class Rendered:
    """A talk as text.

    Attributes:
        text: what the tokenizer gets.
        spans: characters that count in the loss; None where a turn could not be found again in the text.
        templated: special tokens are in the text already.
        folded: the system turn went into the first user turn.
        realigned: the template rewrites earlier turns, so a span was found by what prefix and whole have in common.
    """

    text: str
    spans: tuple[Span, ...] | None
    templated: bool
    folded: bool = False
    realigned: bool = False


def template_of(tokenizer: Any, kwargs: dict[str, Any]) -> Render:
    """The tokenizer's chat template as a function from turns to text, with ``kwargs`` as extra variables."""

    def render(turns: Sequence[Turn], then_answer: bool) -> str:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=then_answer, **kwargs)
        return str(text)

    return render


def render_plain(talk: Talk, loss: str) -> Rendered:
    """Turns one after the other without a template: text and completion exactly as given, else blank lines between.

    ``prompt+completion`` is the prompt and then the completion, with nothing in between and nothing after.
    """
    pieces = [plain_content(turn) for turn in talk.turns]
    ends = [len(talk.glue.join(pieces[: n + 1])) for n in range(len(pieces))]
    spans = tuple((ends[i] - len(pieces[i]), ends[i]) for i in counted_turns(talk.turns, loss))
    return Rendered(talk.glue.join(pieces), spans, templated=False)


def plain_content(turn: Turn) -> str:
    """The text of a turn, whose content may also be a list of parts."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


def counted_turns(turns: Sequence[Turn], loss: str) -> list[int]:
    """Indices of the turns whose tokens count: the last assistant turn, or all of them; none for ``all``."""
    spoken = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    return {"all": [], "completion": spoken[-1:], "assistant": spoken}[loss]


def render_chat(talk: Talk, loss: str, render: Render, where: str) -> Rendered:
    """Render a talk with the chat template; a talk that ends with a question gets the generation prompt.

    Raises:
        PromptError: the template refuses the talk.
    """
    turns, text, folded = _render_or_fold(talk, render, where)
    spans: list[Span] = []
    realigned = False
    for i in counted_turns(turns, loss):
        found = _turn_span(render, turns, i, text)
        if found is None:
            return Rendered(text, None, templated=True, folded=folded)
        spans.append((found[0], found[1]))
        realigned |= found[2]
    return Rendered(text, tuple(spans), templated=True, folded=folded, realigned=realigned)


def _render_or_fold(talk: Talk, render: Render, where: str) -> tuple[tuple[Turn, ...], str, bool]:
    turns = talk.turns
    try:
        return turns, render(turns, not talk.answered), False
    except Exception as error:  # a template is a program from the checkpoint: it may raise anything
        refused = PromptError(f"{where}: the chat template refuses it: {first_line(error)}")
    folded = fold_system(turns)
    if folded is None:
        raise refused
    try:
        return folded, render(folded, not talk.answered), True
    except Exception:  # the reason that counts is the first one
        raise refused from None


def fold_system(turns: Sequence[Turn]) -> tuple[Turn, ...] | None:
    """The system turn's text put before that of the first user turn; None where one of the two is missing."""
    if len(turns) < 2 or (turns[0]["role"], turns[1]["role"]) != ("system", "user"):
        return None
    contents = [plain_content(turn) for turn in turns[:2]]
    return ({**turns[1], "content": "\n\n".join(filter(None, contents))}, *turns[2:])


def _turn_span(render: Render, turns: Sequence[Turn], i: int, text: str) -> tuple[int, int, bool] | None:
    """Start and end of turn ``i`` in ``text``, and whether they had to be realigned; None if it is not there."""
    content = plain_content(turns[i])
    try:
        before, silent = render(turns[:i], True), render(turns[:i], False)
        through = render(turns[: i + 1], False)
    except Exception:  # it took the whole talk, but not its beginning
        return None
    start, end = len(before), len(through)
    if not text.startswith(before):
        start = _realigned_start(text, before, silent, content)
    if not text.startswith(through):
        end = _realigned_end(text, through, start, content)
    if not 0 <= start < end:
        return None
    exact = text.startswith(before) and text.startswith(through)
    return start, _without_gap(text, start, end, content), not exact


def _realigned_start(text: str, before: str, silent: str, content: str) -> int:
    """Where the turn starts if only the generation prompt differs, e.g. by an empty thought; -1 if more does."""
    if not text.startswith(silent):
        return -1
    parted = _common(text, before)  # may be inside an answer that begins like the generation prompt ends
    at = text.find(content.strip() or before, len(silent))
    return at if 0 <= at < parted else parted


def _realigned_end(text: str, through: str, start: int, content: str) -> int:
    """Where the turn that ends ``through`` ends in ``text``, which has it in other words; -1 if it has not."""
    for cut in range(start, len(through.rstrip())):  # thoughts at its head were dropped
        if text.startswith(through[cut], start) and text.startswith(through[cut:], start):
            return start + len(through) - cut
    end = _common(text, through)  # the last turn of a talk is closed by another mark
    return end if content.strip() in text[start:end] else -1


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _without_gap(text: str, start: int, end: int, content: str) -> int:
    """``end`` without the blanks that a template puts behind the end-of-turn mark: the model never says them.

    Where blanks are all there is behind the content, they are the mark.
    """
    shown = text[start:end].rstrip()
    return end if shown.endswith(content.rstrip()) else start + len(shown)


# Tokenising: text to ids.


def tokenise(tokenizer: Any, rendered: Rendered, *, everything: bool) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids and, for each, whether it overlaps a span (``everything``: all but the first count).

    Text without a template gets the tokenizer's own special tokens, rendered text none; never two BOS.
    A token that straddles the start of a span counts: it carries part of the answer.
    """
    encoded = tokenizer(
        rendered.text,
        add_special_tokens=not rendered.templated,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # longer than the model takes is no news here: it is cut afterwards
    )
    ids = list(encoded["input_ids"])
    if everything:
        counts = [True] * len(ids)
    elif tokenizer.is_fast:
        counts = [_overlaps(token, rendered.spans or ()) for token in encoded["offset_mapping"]]
    else:
        counts = _counts_by_prefix(tokenizer, rendered, ids)
    counts[:1] = [False] * len(ids[:1])  # nothing predicts the first token
    doubled = _doubled_bos(ids, tokenizer.bos_token_id)
    return tuple(ids[doubled:]), (*counts[:1], *counts[doubled + 1 :])


def _overlaps(token: Span, spans: Sequence[Span]) -> bool:
    return any(max(token[0], start) < min(token[1], end) for start, end in spans)


def _counts_by_prefix(tokenizer: Any, rendered: Rendered, ids: list[int]) -> list[bool]:
    """For tokenizers without offsets: a span starts where the text before it stops having the same tokens."""

    def tokens_before(position: int) -> int:
        prefix = tokenizer(rendered.text[:position], add_special_tokens=not rendered.templated, verbose=False)
        return _common(ids, prefix["input_ids"])

    spans = [(tokens_before(start), tokens_before(end)) for start, end in rendered.spans or ()]
    return [any(start <= t < end for start, end in spans) for t in range(len(ids))]


def _doubled_bos(ids: list[int], bos: int | None) -> int:
    """How many BOS to drop: a text may bring its own, and a template may render two."""
    leading = next((n for n, token in enumerate(ids) if token != bos), len(ids))
    return max(leading - 1, 0)
