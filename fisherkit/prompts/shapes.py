"""Rows of sets with a shape of their own, rewritten as plain columns: text, or lists of messages.

Each function takes a row and returns one with the columns that ``known_sets`` reads. A row without an answer (a test
split, an unanswerable question) raises UnusableRowError: it is skipped and counted.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from fisherkit.errors import PromptError
from fisherkit.prompts.turns import Row, UnusableRowError
from fisherkit.prompts.wording import type_name

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def multiple_choice(row: Row) -> Row:
    """MMLU: the question with its lettered choices, answered by the letter."""
    texts, labels = _choices(row)
    chosen = right_choice(row["answer"], texts, labels)
    return {"question": _with_choices(row["question"], texts, labels), "answer": labels[chosen]}


def choice_by_key(row: Row) -> Row:
    """ARC, CommonsenseQA, OpenBookQA: the question with its labelled choices, answered by the text of the right one."""
    texts, labels = _choices(row)
    question = row["question"] if "question" in row else row["question_stem"]
    return {
        "question": _with_choices(question, texts, labels),
        "answer": texts[right_choice(row["answerKey"], texts, labels)],
    }


def right_ending(row: Row) -> Row:
    """HellaSwag: a context and the right one of its endings."""
    endings = _texts(row["endings"])
    return {"ctx": row["ctx"], "ending": endings[right_choice(row["label"], endings, [])]}


def first_answer(row: Row) -> Row:
    """SQuAD: a passage, a question and the first of its answers."""
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, dict) else answers
    found = next(iter(_texts(texts or [])), None)
    if found is None:
        raise UnusableRowError("has no answer")
    return {"context": row.get("context"), "question": row["question"], "answer": found}


def preferred_output(row: Row) -> Row:
    """OpenAI's preferences: the messages, the tools and the preferred answer."""
    asked = row["input"]
    return {"messages": asked["messages"], "tools": asked.get("tools"), "completion": row["preferred_output"]}


def helpful_harmless(row: Row) -> Row:
    """HH-RLHF: one text with ``Human:`` and ``Assistant:`` in it, as messages."""
    _, *pieces = _HH_TURN.split(str(row["chosen"]))
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": names[name], "content": text.strip()} for name, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return {"chosen": turns}


def is_helpful_harmless(row: Row) -> bool:
    """Tell HH-RLHF's ``chosen`` from other text."""
    return isinstance(row.get("chosen"), str) and str(row["chosen"]).startswith("\n\nHuman:")


def best_thread(row: Row) -> Row:
    """OASST as trees: from the first message down, always the best-ranked reply."""
    messages, node = [], row["prompt"]
    while isinstance(node, dict):
        messages.append({"role": node.get("role"), "content": node.get("text")})
        node = best_reply(node.get("replies") or ())
    return {"messages": without_open_question(messages)}


def best_reply(replies: Iterable[Any]) -> Any:
    """Return the reply of lowest rank, the first of equals; those without a rank come last, deleted ones never."""
    kept = [reply for reply in replies if isinstance(reply, dict) and not reply.get("deleted")]
    return min(kept, key=lambda reply: _rank(reply.get("rank")), default=None)


def without_open_question(messages: Sequence[Row]) -> list[Row]:
    """Leave out a last question that nobody answered, if anything was answered at all."""
    ends = [n for n, message in enumerate(messages, 1) if message["role"] == "assistant"]
    return list(messages[: ends[-1]] if ends else messages)


def _rank(rank: Any) -> float:
    return float(rank) if isinstance(rank, int | float) and abs(rank) < 1e9 else float("inf")


def choices_of(row: Row, column: str) -> tuple[list[str], list[str]]:
    """Return the texts of a row's choices, and their labels where they have some.

    Args:
        row: of the set.
        column: holds a list of texts, ``{"text", "label"}``, or a list of these; ``A`` stands for A, B, C and D.

    Raises:
        PromptError: it holds something else.
    """
    choices = [row[letter] for letter in "ABCD"] if column == "A" else row[column]
    if isinstance(choices, dict):
        return _texts(choices.get("text")), _texts(choices.get("label"))
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        return _texts([choice.get("text") for choice in choices]), _texts([choice.get("label") for choice in choices])
    return _texts(choices), []


def _choices(row: Row) -> tuple[list[str], list[str]]:
    """Return the texts and labels of a row's choices; letters where they have none."""
    texts, labels = choices_of(row, "choices" if "choices" in row else "A")
    return texts, labels or list(_LETTERS[: len(texts)])


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise PromptError(f"its choices or answers are {type_name(values)}, not a list of text")
    return [str(value) for value in values]


def _with_choices(question: Any, texts: Sequence[str], labels: Sequence[str]) -> str:
    if not isinstance(question, str):
        raise PromptError(f"its question is {type_name(question)}, not text")
    listed = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=False))
    return f"{question}\n\n{listed}"


def right_choice(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> int:
    """Return the place of the right choice, given as a label, a letter, a number from 0 or the choice itself.

    A label comes first: ARC has questions whose labels are 1 to 4.

    Raises:
        UnusableRowError: it is hidden, or none of the choices.
    """
    key = str(answer).strip() if isinstance(answer, str | int) else ""
    if not key or key == "-1":  # how test splits hide it
        raise UnusableRowError("has no answer")
    for known in (labels or list(_LETTERS[: len(texts)]), [str(n) for n in range(len(texts))], texts):
        if key in known:
            return min(list(known).index(key), len(texts) - 1)
    raise UnusableRowError("has an answer that is none of its choices")
