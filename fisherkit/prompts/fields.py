"""From the fields of a row to the turns of a conversation.

A *conversation* is a list of turns ``{"role": ..., "content": ...}``, as chat templates take them. Knows nothing of
files, templates or tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

from fisherkit.errors import PromptError

Turn = dict[str, Any]
Row = dict[str, Any]

_TYPE_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
_SHAREGPT_KEYS = {"from": "role", "value": "content"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
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
class PromptFields:
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

    def read(self, row: Row, where: str) -> Conversation:
        """Turn a row into a talk; ``where`` names the row in a PromptError."""
        asked = _value(row, self.ask, where)
        if isinstance(asked, str):
            return self._read_text(row, asked, where)
        turns = _turns(asked, self.ask, where)
        return Conversation(self._with_answer(turns, row, where))

    def _read_text(self, row: Row, asked: str, where: str) -> Conversation:
        if self.kind in ("messages", "conversations"):
            raise PromptError(f"{where}: field {self.ask!r} is text, not a list of messages")
        context = row.get(self.context) if self.context else None
        if context and isinstance(context, str):
            asked = f"{asked}\n\n{context}"
        turns = self._with_answer(({"role": "user", "content": asked},), row, where)
        exact = self.ask == "prompt" and self.answer is not None and isinstance(row[self.answer], str)
        return Conversation(turns, raw=self.kind in ("text", "chosen"), glue="" if exact else "\n\n")

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
_KNOWN_FIELDS = (
    PromptFields("prompt+completion", "prompt", "completion"),
    PromptFields("messages", "messages"),
    PromptFields("conversations", "conversations"),
    PromptFields("prompt+chosen", "prompt", "chosen"),
    PromptFields("instruction+output", "instruction", "output", "input"),
    PromptFields("instruction", "instruction", None, "input"),
    PromptFields("question+answer", "question", "answer"),
    PromptFields("prompt", "prompt"),
    PromptFields("text", "text"),
    PromptFields("chosen", "chosen"),
)


def detect_fields(row: Row, field: str | None, where: str) -> PromptFields:
    """Find out what the fields of the first row mean; ``field`` names the one to read instead.

    Raises:
        PromptError: the row has no field that is known, or not the one asked for.
    """
    if field is not None:
        return _named_field(row, field, where)
    for fields in _KNOWN_FIELDS:
        if fields.ask in row and (fields.answer is None or fields.answer in row):
            return fields if fields.context in row else replace(fields, context=None)
    raise PromptError(
        f"{where}: none of its fields is known (it has: {_names(row)}); name the one to read with --field, "
        "or call it prompt, text or messages"
    )


def _named_field(row: Row, field: str, where: str) -> PromptFields:
    value = _value(row, field, where)
    if isinstance(value, str):
        return PromptFields("text" if field == "text" else "prompt", field)
    return PromptFields("conversations" if field == "conversations" else "messages", field)


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
