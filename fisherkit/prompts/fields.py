"""Columns of a row that hold the question, the answer and what goes with them; and a row read by them.

The sets that are known by their columns stand in ``known_sets``. Knows nothing of files, templates or tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fisherkit.errors import PromptError
from fisherkit.prompts.turns import (
    Conversation,
    Row,
    Turn,
    UnusableRowError,
    drop_leading_answer,
    read_tools,
    read_turns,
)
from fisherkit.prompts.wording import names_of, type_name

_MARKS = {"<image>": "an image", "<audio>": "audio", "<video>": "a video"}  # LLaVA's place for a medium in a text


@dataclass(frozen=True)
class PromptFields:
    """Columns of a row by what they hold.

    Attributes:
        kind: the name of the layout, e.g. ``prompt+completion``.
        ask: the column with the prompt, the text or the messages.
        answer: the column with the assistant's answer.
        context: a column whose text goes with the prompt, a blank line between; may be empty (Alpaca's ``input``).
        system: a column with the text of a system turn; may be empty.
        context_first: the context stands before the prompt, not behind it.
        needs: columns that a row must have where they are not those above; ``input.messages`` is a key inside one.
        rewrite: makes a row of plain columns first; for sets with a shape of their own.
    """

    kind: str
    ask: str
    answer: str | None = None
    context: str | None = None
    system: str | None = None
    context_first: bool = False
    needs: tuple[str, ...] = ()
    rewrite: Callable[[Row], Row] | None = None

    @property
    def field(self) -> str:
        """Columns that are read, e.g. ``instruction+input+output``."""
        return "+".join(self.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read, in the order of the text."""
        if self.needs:
            return tuple(need.partition(".")[0] for need in self.needs)
        user = (self.context, self.ask) if self.context_first else (self.ask, self.context)
        return tuple(name for name in (self.system, *user, self.answer) if name)

    def fits(self, row: Row) -> bool:
        """True if a row has the columns that this layout cannot do without."""
        return all(_has(row, need) for need in self.needs or filter(None, (self.ask, self.answer)))

    def read(self, row: Row, where: str) -> Conversation:
        """Turn a row into a conversation.

        Args:
            row: columns by name, as JSON values.
            where: the row's name in error messages.

        Returns:
            The conversation; ``unusable`` says why it cannot become a sample where it cannot.

        Raises:
            PromptError: a column is missing or is not what this layout takes it for.
        """
        try:
            return self._conversation(self._plain(row, where), where)
        except UnusableRowError as error:
            return Conversation((), unusable=str(error))

    def _plain(self, row: Row, where: str) -> Row:
        if self.rewrite is None:
            return row
        missing = next((need for need in self.needs if not _has(row, need)), None)
        if missing is not None:
            raise _no_field(row, missing, where)
        try:
            return self.rewrite(row)
        except UnusableRowError:
            raise
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from None

    def _conversation(self, row: Row, where: str) -> Conversation:
        asked = _value(row, self.ask, where)
        if isinstance(asked, list):
            turns = read_turns(asked, self.ask, where)
        elif self.kind in ("messages", "conversations"):
            raise PromptError(f"{where}: field {self.ask!r} is text, not a list of messages")
        else:
            turns = ({"role": "user", "content": self._with_context(row, asked, where)},)
        turns = self._with_system(self._with_answer(turns, row, where), row, where)
        _refuse_media(row, turns)
        kept = drop_leading_answer(turns) if self.kind == "conversations" else turns
        return Conversation(
            kept,
            raw=self.kind in ("text", "chosen") and isinstance(asked, str),
            glue="" if self._follows_at_once(row, asked) else "\n\n",
            tools=read_tools(row, where) if isinstance(asked, list) else (),
            dropped=len(turns) - len(kept),
        )

    def _with_context(self, row: Row, asked: str, where: str) -> str:
        context = _optional_text(row, self.context, where)
        return "\n\n".join(filter(None, (context, asked) if self.context_first else (asked, context)))

    def _with_system(self, turns: tuple[Turn, ...], row: Row, where: str) -> tuple[Turn, ...]:
        text = _optional_text(row, self.system, where)
        if not text.strip() or (turns and turns[0]["role"] == "system"):
            return turns
        return ({"role": "system", "content": text}, *turns)

    def _with_answer(self, asked: tuple[Turn, ...], row: Row, where: str) -> tuple[Turn, ...]:
        if self.answer is None:
            return asked
        answer = _value(row, self.answer, where, numbers=True)
        if isinstance(answer, list) and all(isinstance(item, str) for item in answer):
            answer = _first(answer)
        if isinstance(answer, str):
            return (*asked, {"role": "assistant", "content": answer})
        turns = read_turns(answer, self.answer, where)
        # Preference sets often repeat the prompt in the answer's messages.
        return turns if turns and turns[0]["role"] in ("system", "user") else asked + turns

    def _follows_at_once(self, row: Row, asked: Any) -> bool:
        """True for TRL's columns of text, where the completion brings the blank before it, if there is one."""
        return (
            self.ask == "prompt"
            and self.answer in ("completion", "chosen")
            and isinstance(asked, str)
            and not isinstance(row[self.answer], list)
        )


def named_field(row: Row, field: str, where: str) -> PromptFields:
    """Return the layout of a single column that the user named.

    Raises:
        PromptError: the row has no such column, or it is neither text nor a list of messages.
    """
    if isinstance(_value(row, field, where), str):
        return PromptFields("text" if field == "text" else "prompt", field)
    return PromptFields("conversations" if field == "conversations" else "messages", field)


def mapped_fields(row: Row, columns: dict[str, str], where: str) -> PromptFields:
    """Return the layout that the user spelled out; a context that is named before the prompt stands before it.

    Args:
        row: the first one.
        columns: from ``prompt``, ``context``, ``system`` and ``completion`` to names of columns, in the user's order.
        where: the row's name in error messages.

    Raises:
        PromptError: the row lacks one of the columns.
    """
    for name in columns.values():
        if name not in row:
            raise _no_field(row, name, where)
    roles = list(columns)
    return PromptFields(
        kind="prompt+completion" if "completion" in columns else "prompt",
        ask=columns["prompt"],
        answer=columns.get("completion"),
        context=columns.get("context"),
        system=columns.get("system"),
        context_first="context" in roles and roles.index("context") < roles.index("prompt"),
    )


def _has(row: Row, need: str) -> bool:
    column, _, key = need.partition(".")
    return column in row and (not key or (isinstance(row[column], dict) and key in row[column]))


def _value(row: Row, field: str, where: str, *, numbers: bool = False) -> Any:
    """Return a column's text or list; ``numbers`` takes a number for its text, as answers often are one."""
    if field not in row:
        raise _no_field(row, field, where)
    value = row[field]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str | list):
        raise PromptError(f"{where}: field {field!r} is {type_name(value)}, not text and not a list of messages")
    return value


def _first(answers: list[str]) -> str:
    """Return the first of several right answers, as TriviaQA and Natural Questions list them."""
    if not answers:
        raise UnusableRowError("has no answer")
    return answers[0]


def _optional_text(row: Row, field: str | None, where: str) -> str:
    """Return a column's text, the texts of a list a blank line apart, nothing where the row has none."""
    value = row.get(field) if field is not None else None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n\n".join(value)
    if value is not None and not isinstance(value, str):
        raise PromptError(f"{where}: field {field!r} is {type_name(value)}, not text")
    return value or ""


def _no_field(row: Row, field: str, where: str) -> PromptError:
    return PromptError(f"{where}: no field {field[:80]!r} (it has: {names_of(row)})")


def _refuse_media(row: Row, turns: tuple[Turn, ...]) -> None:
    """Refuse a row whose text has a place for a medium that lies in another column (LLaVA)."""
    for mark, medium in _MARKS.items():
        name = mark.strip("<>")
        if (row.get(name) or row.get(name + "s")) and any(mark in turn["content"] for turn in turns):
            raise UnusableRowError(f"holds {medium}")
