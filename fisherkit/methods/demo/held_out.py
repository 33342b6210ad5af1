"""Prompt sets of the demo that its models never read: ``old`` is the kind of text of the base, ``new`` the tasks.

And some of what they did read, for a repair.

Rows are questions with their answers, as people have them in files of their own. No tensors.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fisherkit.checkpoint.atomic import write_text
from fisherkit.methods.demo.corpus import Conversation, Corpus, read_corpus
from fisherkit.methods.demo.tasks import task_conversations

ROWS = 60
"""Conversations kept from the training of either model."""
LEARNT_ROWS = 200
"""Conversations of the training of either model that are written out."""


def learnt_corpus(corpus: Corpus, rows: int = ROWS) -> Corpus:
    """Return the text that the base is trained on: all but the conversations of the set ``old``."""
    kept = [turns for at, turns in enumerate(corpus.conversations) if not _is_held_out(corpus, at, rows)]
    return Corpus(tuple(kept), corpus.plain)


def learnt_tasks(count: int, seed: int, rows: int = ROWS) -> tuple[Conversation, ...]:
    """Return ``count`` tasks that the fine-tune is trained on: none of the set ``new``."""
    return task_conversations(count + rows, seed)[rows:]


def write_sets(folder: Path, seed: int = 0, rows: int = ROWS) -> dict[str, Path]:
    """Write both sets as ``old.jsonl`` and ``new.jsonl``, in place of what is there, and return them by name.

    Args:
        folder: of the demo.
        seed: of the tasks, as the fine-tune was given it.
        rows: of each set.

    Raises:
        OutputError: the place cannot be written.
    """
    corpus = read_corpus()
    old = [turns for at, turns in enumerate(corpus.conversations) if _is_held_out(corpus, at, rows)]
    return _written(folder, {"old": old, "new": task_conversations(rows, seed)})


def write_learnt(folder: Path, seed: int = 0, rows: int = LEARNT_ROWS) -> dict[str, Path]:
    """Write rows that the models were trained on as ``learnt-old.jsonl`` and ``learnt-new.jsonl``.

    Args: as of write_sets.

    Raises:
        OutputError: the place cannot be written.
    """
    old = learnt_corpus(read_corpus()).conversations
    every = max(1, len(old) // rows)
    return _written(folder, {"learnt-old": old[::every][:rows], "learnt-new": learnt_tasks(rows, seed)})


def _written(folder: Path, sets: Mapping[str, Sequence[Conversation]]) -> dict[str, Path]:
    paths = {name: folder / f"{name}.jsonl" for name in sets}
    for name, conversations in sets.items():
        write_text(paths[name], "".join(map(_row, conversations)))
    return paths


def _is_held_out(corpus: Corpus, at: int, rows: int) -> bool:
    """Return whether a conversation is of the set: ``rows`` of them, spread evenly over documentation and sources."""
    count = len(corpus.conversations)
    return (at + 1) * rows // count > at * rows // count


def _row(turns: Conversation) -> str:
    asked, answer = turns[:2]
    return json.dumps({"prompt": asked["content"], "completion": answer["content"]}, ensure_ascii=False) + "\n"
