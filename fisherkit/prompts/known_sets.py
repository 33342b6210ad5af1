"""Sets that are known by their columns, and the remark on columns that look like an answer but are not read."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fisherkit.errors import PromptError
from fisherkit.options import parse_field
from fisherkit.prompts import shapes
from fisherkit.prompts.fields import PromptFields, mapped_fields, named_field
from fisherkit.prompts.turns import Conversation, Row
from fisherkit.prompts.wording import names_of

MULTIPLE_CHOICE = "multiple choice"
"""Kind of the sets whose last needed column names the right one of several choices."""

# In order of preference: what says more comes first, so that Alpaca's rendered ``text`` and UltraChat's
# ``prompt`` do not win over the columns they were made from.
KNOWN_SETS = (
    PromptFields("prompt+completion", "prompt", "completion"),
    PromptFields("messages", "messages"),
    PromptFields("conversations", "conversations", system="system"),
    PromptFields("conversations", "conversation"),  # LMSYS-Chat
    PromptFields("prompt+chosen", "prompt", "chosen"),
    PromptFields(
        *("preferred_output", "messages", "completion"),
        needs=("input.messages", "preferred_output"),
        rewrite=shapes.preferred_output,
    ),
    PromptFields("thread", "messages", needs=("prompt.replies",), rewrite=shapes.best_thread),
    PromptFields(
        MULTIPLE_CHOICE, "question", "answer", needs=("question", "choices", "answer"), rewrite=shapes.multiple_choice
    ),
    PromptFields(
        *(MULTIPLE_CHOICE, "question", "answer"),
        needs=("question", "A", "B", "C", "D", "answer"),
        rewrite=shapes.multiple_choice,
    ),
    *(
        PromptFields(
            MULTIPLE_CHOICE, "question", "answer", needs=(ask, "choices", "answerKey"), rewrite=shapes.choice_by_key
        )
        for ask in ("question", "question_stem")
    ),
    PromptFields(MULTIPLE_CHOICE, "ctx", "ending", needs=("ctx", "endings", "label"), rewrite=shapes.right_ending),
    PromptFields(
        *("question+answers", "question", "answer", "context"),
        context_first=True,
        needs=("context", "question", "answers"),
        rewrite=shapes.first_answer,
    ),
    PromptFields("instruction+output", "instruction", "output", "input", system="system"),
    PromptFields("instruction+response", "instruction", "response", "context"),  # Dolly
    PromptFields("question+response", "question", "response", system="system_prompt"),  # Orca
    PromptFields("question+answer", "question", "answer", "context", context_first=True),
    PromptFields("prompt+response", "prompt", "response", system="system"),
    PromptFields("prompt+answer", "prompt", "answer"),  # TRACE
    PromptFields("query+response", "query", "response"),  # MetaMath
    PromptFields("problem+solution", "problem", "solution"),  # MATH
    PromptFields("problem+answer", "problem", "answer"),
    PromptFields("input+output", "input", "output"),
    PromptFields("inputs+targets", "inputs", "targets"),  # FLAN
    PromptFields("instruction", "instruction", None, "input"),
    PromptFields("prompt", "prompt"),
    PromptFields("question", "question"),
    PromptFields("query", "query"),
    PromptFields("problem", "problem"),
    PromptFields("text", "text"),
    PromptFields("chosen", "chosen"),
    PromptFields("text", "content"),  # The Stack
)

_ANSWER = re.compile(
    r"(^|_)(answer|response|output|completion|solution|target|reply|label|gold|reference|summary|assistant|expected"
    r"|chosen|ground_?truth)s?(_?text|_?key)?$",
    re.IGNORECASE,
)
_CONTEXT = re.compile(r"(^|_)(context|passage|document|article|background|evidence)s?$", re.IGNORECASE)
_QUESTION = re.compile(r"(^|_)(prompt|instruction|question|query|problem|input)s?(_?text)?$", re.IGNORECASE)


def detect_fields(row: Row, field: str | None, where: str) -> PromptFields:
    """Find out what the columns of the first row mean.

    Args:
        row: the first one.
        field: ``--field``: the column to read, or ``prompt=COLUMN,completion=COLUMN``; None to look.
        where: the row's name in error messages.

    Raises:
        PromptError: no column is known, or the row lacks one that was asked for.
    """
    if field is not None:
        columns = parse_field(field)
        return mapped_fields(row, columns, where) if columns else named_field(row, field, where)
    for fields in KNOWN_SETS:
        if fields.fits(row):
            return _for_this_row(fields, row)
    raise PromptError(
        f"{where}: none of its fields is known (it has: {names_of(row)}); name the one to read with --field, "
        "or with --field prompt=..,completion=.. those of question and answer"
    )


def unused_answer(
    fields: PromptFields, rows: Iterable[tuple[str, Row]], conversations: Iterable[Conversation]
) -> str | None:
    """Return a remark on the first row with a column that looks like an answer and is not read, or None.

    An answer that the assistant gives all the same is not lost: MATH's solution ends in the answer.
    """
    for (where, row), conversation in zip(rows, conversations, strict=True):
        remark = None if conversation.unusable else _remark(fields, row, conversation)
        if remark:
            return f"{where}: {remark}"
    return None


def _for_this_row(fields: PromptFields, row: Row) -> PromptFields:
    if fields.kind == "chosen" and shapes.is_helpful_harmless(row):
        return replace(fields, needs=("chosen",), rewrite=shapes.helpful_harmless)
    if fields.rewrite is not None:
        return fields
    return replace(
        fields,
        context=fields.context if _may_be_text(row, fields.context) else None,
        system=fields.system if _may_be_text(row, fields.system) else None,
    )


def _may_be_text(row: Row, name: str | None) -> bool:
    """True if a row has a column that is text, a list of it, or null, which may be text in the next row."""
    if name not in row:
        return False
    value = row[name]
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_str, value)))


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _remark(fields: PromptFields, row: Row, conversation: Conversation) -> str | None:
    text = "\n".join(turn["content"] for turn in conversation.turns if turn["role"] == "assistant")
    unused = {name: value for name, value in row.items() if name not in fields.columns and _is_text(value)}
    lost = [name for name, value in unused.items() if str(value).strip() not in text]
    answer = next((name for name in lost if _ANSWER.search(name)), None)
    ask = fields.ask if fields.ask in row and not _answers_itself(fields, conversation) else None
    ask = ask or next((name for name in row if _QUESTION.search(name) and _is_text(row[name])), None)
    if answer is None or ask is None or ask == answer:
        return None
    context = fields.context or next((name for name in lost if _CONTEXT.search(name)), None)
    columns = {"prompt": ask, "context": context, "completion": answer}
    option = ",".join(f"{role}={name}" for role, name in columns.items() if name)
    return f"{answer!r} looks like an answer and is not read; --field {option} would"[:200]


def _answers_itself(fields: PromptFields, conversation: Conversation) -> bool:
    return fields.answer is None and conversation.answered


def _is_text(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, int | float)
