"""Spans of a rendered conversation that the assistant wrote.

A *span* is a pair of character positions ``(start, end)`` in rendered text. Two ways lead to it:

- a template may mark what the assistant generates, ``{% generation %} ... {% endgeneration %}``;
- most don't, so prefixes are rendered: what the template makes of ``turns[:i]`` with a generation prompt ends where
  turn ``i`` begins, what it makes of ``turns[:i+1]`` ends where it ends.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fisherkit.prompts.turns import Turn

Span = tuple[int, int]
Render = Callable[[Sequence[Turn], bool], str]  # turns, and whether the assistant is to speak next


def counted_turns(turns: Sequence[Turn], loss: str) -> list[int]:
    """Return the indices of the turns whose tokens count.

    Args:
        turns: of a conversation; those with ``weight: 0`` never count.
        loss: ``all`` (no turn by itself), ``completion`` (the last answer) or ``assistant`` (every one).
    """
    spoken = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight") != 0]
    return {"all": [], "completion": spoken[-1:], "assistant": spoken}[loss]


def marked_spans(turns: Sequence[Turn], counted: Sequence[int], text: str, marks: Sequence[Span]) -> list[Span] | None:
    """Choose among the marks of a template those of the turns that count.

    Args:
        turns: of the conversation.
        counted: indices of those that count, of the assistant's.
        text: the conversation rendered.
        marks: what the template marks as generated, in order.

    Returns:
        A span for each counted turn; None where marks and turns cannot be matched: not one for each, or a mark
        without the turn's content in it (transformers misplaces marks inside macros and filters).
    """
    spoken = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    marks = [mark for mark in marks if mark[0] < mark[1]]
    if len(marks) != len(spoken):
        return None
    found = dict(zip(spoken, marks, strict=True))
    if any(turns[i]["content"].strip() not in text[slice(*mark)] for i, mark in found.items()):
        return None
    return [found[i] for i in counted]


def search_spans(
    render: Render, turns: Sequence[Turn], counted: Sequence[int], text: str
) -> tuple[list[Span] | None, bool]:
    """Find turns in a rendered conversation by rendering prefixes of it.

    Args:
        render: the template.
        turns: of the conversation.
        counted: indices of those to be found.
        text: the conversation rendered.

    Returns:
        A span for each, or None where one is not there; and whether the template rewrites earlier turns, so that a
        span was found by what prefix and whole have in common.
    """
    found = [_turn_span(render, turns, i, text) for i in counted]
    spans = [(span[0], span[1]) for span in found if span is not None]
    return (spans if len(spans) == len(found) else None), any(span[2] for span in found if span is not None)


def _turn_span(render: Render, turns: Sequence[Turn], i: int, text: str) -> tuple[int, int, bool] | None:
    """Return start and end of turn ``i`` in ``text``, and whether they had to be realigned; None if it is not there."""
    content = turns[i]["content"]
    try:
        through = render(turns[: i + 1], False)
        if i == 0:  # nothing stands before it that a template could render
            before = silent = text[: max(text.find(content.strip()), 0)]
        else:
            before, silent = render(turns[:i], True), render(turns[:i], False)
    except Exception:  # it took the whole conversation, but not its beginning
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
    """Return where the turn starts if only the generation prompt differs, e.g. by an empty thought; -1 if more does."""
    if not text.startswith(silent):
        return -1
    parted = common_length(text, before)  # may be inside an answer that begins like the generation prompt ends
    at = text.find(content.strip() or before, len(silent))
    return at if 0 <= at < parted else parted


def _realigned_end(text: str, through: str, start: int, content: str) -> int:
    """Return where the turn that ends ``through`` ends in ``text``, which has it in other words; -1 if it has not."""
    if start < 0:
        return -1
    shown = len(through.rstrip())
    for cut in _places(through, text[start : start + _PROBE], start):  # thoughts at its head were dropped
        if cut < shown and text.startswith(through[cut:], start):
            return start + len(through) - cut
    end = common_length(text, through)  # the last turn of a conversation is closed by another mark
    return end if content.strip() in text[start:end] else -1


_PROBE = 32  # characters looked for before the rest is copied for a comparison


def _places(text: str, probe: str, start: int) -> Iterator[int]:
    """Yield the places from ``start`` on where ``text`` goes on like ``probe``, as far as it goes on at all."""
    place = text.find(probe, start)
    while place >= 0:
        yield place
        place = text.find(probe, place + 1)
    near_end = range(max(start, len(text) - len(probe) + 1), len(text))
    yield from (place for place in near_end if probe.startswith(text[place:]))


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the longest common prefix, by bisection: slices compare at C's speed."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _without_gap(text: str, start: int, end: int, content: str) -> int:
    """Return ``end`` without the blanks that a template puts behind the end-of-turn mark: the model never says them.

    Where blanks are all there is behind the content, they are the mark.
    """
    shown = text[start:end].rstrip()
    return end if shown.endswith(content.rstrip()) else start + len(shown)
