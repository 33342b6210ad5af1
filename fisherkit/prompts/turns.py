"""Conversations: messages as prompt sets hold them, made into the turns that chat templates take.

A *turn* is a dict ``{"role": ..., "content": ...}`` whose content is text; ``tool_calls`` and other keys stay beside
it. Knows nothing of files, templates or tokens.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fisherkit.errors import PromptError
from fisherkit.prompts.wording import names_of, type_name

Turn = dict[str, Any]
Row = dict[str, Any]

_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = {"image": "an image", "audio": "audio", "video": "a video", "file": "a file"}
_SHAREGPT_KEYS = {"from": "role", "value": "content"}
_ROLES = {
    **{"human": "user", "prompter": "user"},
    **{"gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"observation": "tool", "function_response": "tool", "tool_response": "tool"},
}


class UnusableRowError(PromptError):
    """A row that is well-formed but cannot become a sample; it is skipped and counted under this text."""


@dataclass(frozen=True)
class Conversation:
    """One row as turns.

    Attributes:
        turns: what is said, in order.
        raw: a text to be continued, not a turn of a chat (kept as one user turn, for ``--chat-template on``).
        glue: what stands between turns when there is no chat template.
        glue_counts: it belongs to the turn behind it, as the blank before a choice does.
        tools: JSON schemas of the functions that the row offers, for the template.
        dropped: turns of the assistant left out because they came before the first question (ShareGPT).
        unusable: why the row cannot become a sample; None where it can.
    """

    turns: tuple[Turn, ...]
    raw: bool = False
    glue: str = "\n\n"
    glue_counts: bool = False
    tools: tuple[Any, ...] = ()
    dropped: int = 0
    unusable: str | None = None

    @property
    def answered(self) -> bool:
        """True if the assistant has the last word."""
        return bool(self.turns) and self.turns[-1]["role"] == "assistant"

    @property
    def empty(self) -> bool:
        """True if the question or the last turn is blank (a blank system turn is common and harmless)."""
        spoken = [turn for turn in self.turns if turn["role"] != "system"]
        return not spoken or _is_blank(spoken[0]) or _is_blank(spoken[-1])


def read_turns(messages: list[Any], field: str, where: str) -> tuple[Turn, ...]:
    """Make turns of a column of messages.

    Args:
        messages: of OpenAI's form (``role``, ``content``) or ShareGPT's (``from``, ``value``).
        field: the column's name, for error messages.
        where: the row's name, for error messages.

    Raises:
        PromptError: a message lacks its role, or its content is neither text nor a list of parts.
        UnusableRowError: a message holds an image, audio, or another part that is not text.
    """
    return tuple(_turn(message, f"{where}: field {field!r}, message {n}") for n, message in enumerate(messages, 1))


def read_tools(row: Row, where: str) -> tuple[Any, ...]:
    """Return the functions that a row offers; its ``tools`` may be JSON text, as tables without nested columns hold it.

    Raises:
        PromptError: ``tools`` is no list of objects.
    """
    tools = row.get("tools") or ()
    if isinstance(tools, str):
        tools = _json_of(tools, default=None) if tools.strip() else ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise PromptError(f"{where}: field 'tools' is not a list of JSON schemas")
    return tuple(_without_nulls(tool, where) for tool in tools)


def drop_leading_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Leave out what the assistant says before the first question; system turns at the head stay."""
    head = [turn for turn in turns[:1] if turn["role"] == "system"]
    start = next((n for n in range(len(head), len(turns)) if turns[n]["role"] != "assistant"), len(turns))
    return (*head, *turns[start:])


def join_parts(content: Any, where: str) -> str:
    """Return content as text; a list of parts is joined with nothing in between, since parts bring their own blanks.

    Raises:
        PromptError: the content is neither text nor a list.
        UnusableRowError: a part is not text.
    """
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    if not isinstance(content, str):
        raise PromptError(f"{where}: its content is {type_name(content)}, not text")
    return content


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise PromptError(f"{where} is {type_name(message)}, not an object with role and content")
    # Column stores fill the keys that a message lacks with null, and templates take null for a tool call.
    turn: Turn = {str(_SHAREGPT_KEYS.get(key, key)): value for key, value in message.items() if value is not None}
    if not isinstance(turn.get("role"), str):
        raise PromptError(f"{where} has no role (it has: {names_of(message)})")
    turn["content"] = join_parts(turn.get("content", ""), where)
    if turn["role"] == "function_call":
        return _function_call(turn["content"])
    if turn.get("tool_calls"):
        turn["tool_calls"] = _map_arguments(turn["tool_calls"], _object_of)
    return {**turn, "role": _ROLES.get(turn["role"], turn["role"])}


def _function_call(content: str) -> Turn:
    """Make a tool call of ShareGPT's turn whose text is ``{"name": ..., "arguments": ...}``, or a list of those."""
    value = _json_of(content, default=None)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return {"role": "assistant", "content": content}
    wrapped = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": _map_arguments(wrapped, _object_of)}


def arguments_as_text(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Spell the arguments of tool calls as JSON text, which is what OpenAI stores and a few templates ask for."""
    return tuple(
        {**turn, "tool_calls": _map_arguments(turn["tool_calls"], _text_of)} if turn.get("tool_calls") else turn
        for turn in turns
    )


def _map_arguments(calls: Any, change: Callable[[Any], Any]) -> Any:
    """Change the arguments in a list of tool calls; what is not of OpenAI's form stays for the template to judge."""
    if not isinstance(calls, list):
        return calls
    return [
        {**call, "function": {**call["function"], "arguments": change(call["function"]["arguments"])}}
        if isinstance(call, dict) and isinstance(call.get("function"), dict) and "arguments" in call["function"]
        else call
        for call in calls
    ]


def _object_of(arguments: Any) -> Any:
    value = _json_of(arguments, default=None) if isinstance(arguments, str) else None
    return value if isinstance(value, dict) else arguments


def _text_of(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _json_of(text: str, default: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return default


def _part_text(part: Any) -> str:
    """Return a part's text, or say which medium it is by its type or the key that it brings."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UnusableRowError(f"holds a part that is {type_name(part)}")
    kind = part.get("type")
    if kind in (*_TEXT_PARTS, None) and isinstance(part.get("text"), str):
        return str(part["text"])
    hints = f"{kind} " + " ".join(key for key, value in part.items() if value is not None and isinstance(key, str))
    medium = next((name for word, name in _MEDIA.items() if word in hints), f"a part of type {str(kind)[:40]!r}")
    raise UnusableRowError(f"holds {medium}")


def _without_nulls(value: Any, where: str, depth: int = 0) -> Any:
    """Leave out the keys of a schema that a column store filled with null."""
    if depth > 100:
        raise PromptError(f"{where}: field 'tools' is nested more than 100 deep")
    if isinstance(value, dict):
        return {key: _without_nulls(item, where, depth + 1) for key, item in value.items() if item is not None}
    return [_without_nulls(item, where, depth + 1) for item in value] if isinstance(value, list) else value


def _is_blank(turn: Turn) -> bool:
    return not turn["content"].strip() and not turn.get("tool_calls")
