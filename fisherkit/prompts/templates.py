"""From the turns of a conversation to text, and to the characters of it that count in the loss.

A *span* is a pair of character positions ``(start, end)`` in rendered text. Stock chat templates don't mark what the
assistant said, so spans are found by rendering prefixes: what the template makes of ``turns[:i]`` with a generation
prompt ends where turn ``i`` begins, what it makes of ``turns[:i+1]`` ends where it ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fisherkit.errors import PromptError, first_line
from fisherkit.prompts.fields import Conversation, Turn

Span = tuple[int, int]
Render = Callable[[Sequence[Turn], bool], str]  # turns, and whether the assistant is to speak next


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


def render_plain(conversation: Conversation, loss: str) -> Rendered:
    """Turns one after the other without a template: text and completion exactly as given, else blank lines between.

    ``prompt+completion`` is the prompt and then the completion, with nothing in between and nothing after.
    """
    pieces = [plain_content(turn) for turn in conversation.turns]
    ends = [len(conversation.glue.join(pieces[: n + 1])) for n in range(len(pieces))]
    spans = tuple((ends[i] - len(pieces[i]), ends[i]) for i in counted_turns(conversation.turns, loss))
    return Rendered(conversation.glue.join(pieces), spans, templated=False)


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


def render_chat(conversation: Conversation, loss: str, render: Render, where: str) -> Rendered:
    """Render a talk with the chat template; a talk that ends with a question gets the generation prompt.

    Raises:
        PromptError: the template refuses the talk.
    """
    turns, text, folded = _render_or_fold(conversation, render, where)
    spans: list[Span] = []
    realigned = False
    for i in counted_turns(turns, loss):
        found = _turn_span(render, turns, i, text)
        if found is None:
            return Rendered(text, None, templated=True, folded=folded)
        spans.append((found[0], found[1]))
        realigned |= found[2]
    return Rendered(text, tuple(spans), templated=True, folded=folded, realigned=realigned)


def _render_or_fold(conversation: Conversation, render: Render, where: str) -> tuple[tuple[Turn, ...], str, bool]:
    turns = conversation.turns
    try:
        return turns, render(turns, not conversation.answered), False
    except Exception as error:  # a template is a program from the checkpoint: it may raise anything
        refused = PromptError(f"{where}: the chat template refuses it: {first_line(error)}")
    folded = fold_system(turns)
    if folded is None:
        raise refused
    try:
        return folded, render(folded, not conversation.answered), True
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
    parted = common_length(text, before)  # may be inside an answer that begins like the generation prompt ends
    at = text.find(content.strip() or before, len(silent))
    return at if 0 <= at < parted else parted


def _realigned_end(text: str, through: str, start: int, content: str) -> int:
    """Where the turn that ends ``through`` ends in ``text``, which has it in other words; -1 if it has not."""
    for cut in range(start, len(through.rstrip())):  # thoughts at its head were dropped
        if text.startswith(through[cut], start) and text.startswith(through[cut:], start):
            return start + len(through) - cut
    end = common_length(text, through)  # the last turn of a talk is closed by another mark
    return end if content.strip() in text[start:end] else -1


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _without_gap(text: str, start: int, end: int, content: str) -> int:
    """``end`` without the blanks that a template puts behind the end-of-turn mark: the model never says them.

    Where blanks are all there is behind the content, they are the mark.
    """
    shown = text[start:end].rstrip()
    return end if shown.endswith(content.rstrip()) else start + len(shown)
