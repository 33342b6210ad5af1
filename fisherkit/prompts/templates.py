"""From the turns of a conversation to text, and to the characters of it that count in the loss.

A chat template is a program that comes with a checkpoint: it may refuse a conversation, leave out a part of it without
a word, or never end. Each of these is found out here, for one row at a time.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fisherkit.errors import PromptError, first_line
from fisherkit.prompts.spans import Span, counted_turns, marked_spans, search_spans
from fisherkit.prompts.time_limit import within
from fisherkit.prompts.turns import Conversation, Turn, UnusableRowError, arguments_as_text
from fisherkit.prompts.wording import clipped

RENDER_SECONDS = 20.0
"""Time for all renderings of one row; honest templates take milliseconds."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_USUAL_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

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


def render_plain(conversation: Conversation, loss: str) -> Rendered:
    """Put turns one after the other without a template: text and completion as given, else blank lines between.

    ``prompt+completion`` is the prompt and then the completion, with nothing in between and nothing after.
    """
    pieces = [_plain_text(turn) for turn in conversation.turns]
    spans, end = {}, 0
    for i, piece in enumerate(pieces):
        start = end + (len(conversation.glue) if i else 0)
        before, end = end, start + len(piece)
        spans[i] = (before if conversation.glue_counts else start, end)
    counted = tuple(spans[i] for i in counted_turns(conversation.turns, loss))
    return Rendered(conversation.glue.join(pieces), counted, templated=False)


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: of transformers.
        kwargs: extra variables of the template; ``chat_template`` among them is a template to use instead.

    Raises:
        PromptError: the template raises to powers, which no one could stop.
    """

    def __init__(self, tokenizer: Any, kwargs: dict[str, Any]) -> None:
        self._tokenizer, self._kwargs = tokenizer, kwargs
        self.source = kwargs.get("chat_template") or tokenizer.chat_template
        texts = self.source.values() if isinstance(self.source, dict) else [self.source]
        if any(map(_has_power, texts)):
            raise PromptError("the chat template computes powers (**), which may take forever; use --chat-template off")

    @property
    def sha256(self) -> str:
        """SHA-256 of the template's text, in hex; of all of them as JSON where there are several."""
        text = self.source if isinstance(self.source, str) else json.dumps(self.source, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def render(self, conversation: Conversation, loss: str) -> Rendered:
        """Render a conversation; one that ends with a question gets the generation prompt.

        Args:
            conversation: with its tools, if any.
            loss: which turns count, see ``counted_turns``.

        Raises:
            UnusableRowError: the template refuses the conversation, or leaves out its tool calls or their results.
            PromptError: the template did not end in time.
        """
        try:
            return within(RENDER_SECONDS, lambda: self._render(conversation, loss))
        except TimeoutError as error:
            raise PromptError(
                f"the chat template does not end ({error}); use --chat-template off, or leave out the row"
            ) from None

    def _render(self, conversation: Conversation, loss: str) -> Rendered:
        turns, text, folded = self._first_accepted(conversation)
        tools, then_answer = conversation.tools, not conversation.answered
        self._refuse_omissions(turns, text, then_answer, tools)
        counted = counted_turns(turns, loss)
        marks = self._marks(turns, text, then_answer, tools) if counted else None
        spans = marked_spans(turns, counted, text, marks) if marks is not None else None
        realigned = False
        if spans is None:
            spans, realigned = search_spans(functools.partial(self._text, tools=tools), turns, counted, text)
        return Rendered(text, None if spans is None else tuple(spans), True, folded, realigned and spans is not None)

    def _text(self, turns: Sequence[Turn], then_answer: bool, tools: Sequence[Any] = ()) -> str:
        options = {**self._kwargs, **({"tools": list(tools)} if tools else {})}
        text = self._tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=then_answer, **options
        )
        return str(text)

    def _first_accepted(self, conversation: Conversation) -> tuple[tuple[Turn, ...], str, bool]:
        """Return the first form of a conversation that the template takes, as turns and text, and whether folded.

        Where it takes none, the last refusal is the real one: the first may be of what the later forms are without.
        """
        refusal = "says nothing"
        for turns, folded in _forms(conversation.turns):
            try:
                return turns, self._text(turns, not conversation.answered, conversation.tools), folded
            except Exception as error:  # a template is a program from the checkpoint: it may raise anything
                refusal = clipped(first_line(error), 120)
        unusual = next((turn["role"] for turn in conversation.turns if turn["role"] not in _USUAL_ROLES), None)
        holding = f" with a {unusual[:20]} turn" if unusual else ""
        raise UnusableRowError(f"refused by the chat template{holding}: {refusal}")

    def _refuse_omissions(self, turns: tuple[Turn, ...], text: str, then_answer: bool, tools: Sequence[Any]) -> None:
        """Raise UnusableRowError where the text would be the same without the tool calls, or without their results."""
        uncalled = tuple({key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns)
        unknown = tuple({**turn, "content": "?"} if turn["role"] == "tool" else turn for turn in turns)
        for changed, what in ((uncalled, "calls"), (unknown, "results")):
            if changed != turns and self._same_text(changed, text, then_answer, tools):
                raise UnusableRowError(f"has tool {what} that the chat template leaves out")

    def _same_text(self, turns: tuple[Turn, ...], text: str, then_answer: bool, tools: Sequence[Any]) -> bool:
        try:
            return self._text(turns, then_answer, tools) == text
        except Exception:  # then it looks at them
            return False

    def _marks(self, turns: tuple[Turn, ...], text: str, then_answer: bool, tools: Sequence[Any]) -> list[Span] | None:
        """Return what the template marks as generated; None where it has no marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self._tokenizer.special_tokens_map, **self._kwargs, **({"tools": list(tools)} if tools else {})}
        options["chat_template"] = self._tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
        if not _MARKS.search(options["chat_template"]):
            return None
        texts, marks = render_jinja_template(
            [list(turns)], return_assistant_tokens_mask=True, add_generation_prompt=then_answer, **options
        )
        return list(marks[0]) if texts == [text] else None


def fold_system(turns: Sequence[Turn]) -> tuple[Turn, ...] | None:
    """Put the system turn's text before that of the first user turn; None where one of the two is missing."""
    if len(turns) < 2 or (turns[0]["role"], turns[1]["role"]) != ("system", "user"):
        return None
    content = "\n\n".join(filter(None, (turn["content"] for turn in turns[:2])))
    return ({**turns[1], "content": content}, *turns[2:])


def _forms(turns: tuple[Turn, ...]) -> Iterator[tuple[tuple[Turn, ...], bool]]:
    """Yield the forms in which a template may take a conversation, and whether the system turn is folded in it."""
    folded = fold_system(turns)
    for form, is_folded in ((turns, False), (folded, True)):
        if form is not None:
            yield form, is_folded
            if any(turn.get("tool_calls") for turn in form):
                yield arguments_as_text(form), is_folded


def _plain_text(turn: Turn) -> str:
    calls = turn.get("tool_calls")
    return "\n".join(filter(None, (turn["content"], json.dumps(calls, ensure_ascii=False) if calls else "")))


def _has_power(template: Any) -> bool:
    """Find the one operator with which a template of a few characters computes for years inside a single call."""
    if not isinstance(template, str):
        return False
    tokens = jinja2.Environment(autoescape=True).lex(template)  # nothing is rendered here
    try:
        return any(kind == "operator" and text == "**" for _, kind, text in tokens)
    except jinja2.TemplateSyntaxError:
        return False  # it will be refused row by row, with what is wrong in it
