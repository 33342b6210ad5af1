"""Multiple-choice questions: a sample for every choice, so that the one of lowest loss can be told.

The prompt of a question is what the same row is to every other command; its choices take the place of the answer. Sets
that are known by their columns (MMLU, ARC, HellaSwag and their like, see known_sets) are asked as there: MMLU by
letter, ARC by text. Of any other set the choices are a column of texts, and the right one a column with its number from
0, its letter, or its text.
"""

from dataclasses import dataclass, replace
from typing import Any

from fisherkit.errors import PromptError
from fisherkit.options import PromptOptions, parse_field
from fisherkit.progress import Say
from fisherkit.prompts import shapes
from fisherkit.prompts.dataset import PromptSet, read_first
from fisherkit.prompts.fields import PromptFields
from fisherkit.prompts.known_sets import KNOWN_SETS, MULTIPLE_CHOICE, detect_fields
from fisherkit.prompts.sample_reader import Sample, SampleReader
from fisherkit.prompts.sources import NamedRow, PromptSource
from fisherkit.prompts.turns import Conversation, Row, UnusableRowError
from fisherkit.prompts.wording import names_of

_KEYS = ("answer", "answerKey", "label", "gold", "target")
"""Columns that may name the right choice, in order of preference."""


@dataclass(frozen=True)
class Question:
    """One question among the samples of its set.

    Attributes:
        row: in its source, from 0.
        samples: numbers of its samples in the set, one for each choice.
        right: which of them is the right one.
        lengths: characters of each choice.
    """

    row: int
    samples: tuple[int, ...]
    right: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class _Asked:
    """One question as conversations, one for each choice; ``unusable`` where it cannot be asked."""

    conversations: tuple[Conversation, ...]
    right: int = 0
    lengths: tuple[int, ...] = ()


def load_choices(
    source: PromptSource, column: str, tokenizer: Any, options: PromptOptions, *, say: Say = lambda line: None
) -> tuple[PromptSet, tuple[Question, ...]]:
    """Read a set of questions and tokenise every choice.

    Args:
        source: see load_prompts.
        column: that holds the choices.
        tokenizer: of transformers.
        options: as of load_prompts; ``field`` may name the columns of the prompt and, as completion, of the right one.
        say: gets lines for a person.

    Returns:
        Samples, those of a question together, and the questions. A question of which one choice cannot become a sample
        is left out.

    Raises:
        PromptError: the set cannot be read, or holds no question.
    """
    rows = read_first(source, options.limit)
    fields, key = _layout(rows[0], column, options.field)
    asked = [_ask(row, where, fields, column, key) for where, row in rows]
    expanded = [(row, conversation) for row, question in enumerate(asked) for conversation in question.conversations]
    reader = SampleReader(
        source,
        [rows[row] for row, _ in expanded],
        fields,
        [conversation for _, conversation in expanded],
        tokenizer,
        replace(options, loss="completion"),
    )
    samples: list[Sample] = []
    questions = []
    at = 0
    for row, question in enumerate(asked):
        count = len(question.conversations)
        made = [reader.sample(number) for number in range(at, at + count)]
        at += count
        whole = [replace(sample, row=row) for sample in made if sample is not None]
        if len(whole) == count and question.lengths:
            numbers = tuple(range(len(samples), len(samples) + count))
            questions.append(Question(row, numbers, question.right, question.lengths))
            samples += whole
    report = replace(reader.report(samples), rows=len(rows))
    return PromptSet(tuple(samples), report), tuple(questions)


def _layout(first: NamedRow, column: str, field: str | None) -> tuple[PromptFields, str]:
    """Return what the columns mean, and the column that names the right choice."""
    where, row = first
    if column not in row:
        raise _no_field(row, column, where)
    columns = parse_field(field or "") or {}
    known = next((known for known in KNOWN_SETS if known.kind == MULTIPLE_CHOICE and known.fits(row)), None)
    if field is None and known is not None and column in known.needs[1:-1]:
        return known, known.needs[-1]
    key = columns.pop("completion", None) or next((name for name in _KEYS if name in row), None)
    if key is None:
        raise PromptError(
            f"{where}: no field says which choice is right (it has: {names_of(row)}); name it with "
            "--field prompt=..,completion=.."
        )
    rest = {name: value for name, value in row.items() if name not in (column, key)}
    asked = ",".join(f"{role}={name}" for role, name in columns.items()) if columns else field
    return detect_fields(rest, asked, where), key


def _ask(row: Row, where: str, fields: PromptFields, column: str, key: str) -> _Asked:
    try:
        for name in (column, key):
            if name not in row:
                raise _no_field(row, name, where)
        texts, labels = shapes.choices_of(row, column)
        if len(texts) < 2:
            raise UnusableRowError("has fewer than two choices")
        right = shapes.right_choice(row[key], texts, labels)
        if fields.kind == MULTIPLE_CHOICE:
            # As the set's own layout has it, were each choice in turn the right one.
            keys = labels or [str(number) for number in range(len(texts))]
            conversations = tuple(fields.read({**row, key: one}, where) for one in keys)
        else:
            asked = fields.read({name: value for name, value in row.items() if name not in (column, key)}, where)
            conversations = tuple(_answered(asked, text) for text in texts)
    except UnusableRowError as error:
        return _Asked((Conversation((), unusable=str(error)),))
    except PromptError as error:
        text = str(error)
        raise PromptError(text if text.startswith(where) else f"{where}: {text}") from None
    answers = [conversation.turns[-1]["content"] if conversation.turns else "" for conversation in conversations]
    return _Asked(conversations, right, tuple(map(len, answers)))


def _answered(asked: Conversation, text: str) -> Conversation:
    """Return a question with an answer; without a template a blank goes before it, unless one of the two has one."""
    if asked.unusable or asked.empty:
        return asked
    blank = text[:1].isspace() or asked.turns[-1]["content"][-1:].isspace()
    turns = (*asked.turns, {"role": "assistant", "content": text})
    return replace(asked, turns=turns, raw=False, glue="" if blank else " ", glue_counts=True)


def _no_field(row: Row, name: str, where: str) -> PromptError:
    return PromptError(f"{where}: no field {name[:80]!r} (it has: {names_of(row)})")
