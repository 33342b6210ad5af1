"""Prompt sets: from rows to samples of token ids.

A *row* is a dict of columns, a *sample* a row's token ids with a mark on each token that counts in the loss. Rows come
from ``sources`` and are read no further than ``limit``; what a row's columns mean is in ``fields``, how turns become
text in ``templates``. In messages, rows count from 1, as editors do. This module knows no tensors.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fisherkit.errors import PromptError
from fisherkit.options import PromptOptions
from fisherkit.progress import Say
from fisherkit.prompts.known_sets import detect_fields, unused_answer
from fisherkit.prompts.report import PromptReport
from fisherkit.prompts.sample_reader import Sample, SampleReader
from fisherkit.prompts.sources import NamedRow, PromptSource, read_rows, short_name

__all__ = ["PromptSet", "Sample", "batches", "load_prompts", "read_first"]


@dataclass(frozen=True)
class PromptSet:
    """Samples in the order of their rows, and how they were read."""

    samples: tuple[Sample, ...]
    report: PromptReport


def load_prompts(
    source: PromptSource, tokenizer: Any, options: PromptOptions, *, say: Say = lambda line: None
) -> PromptSet:
    """Read a prompt set and tokenise it.

    Args:
        source: a file, folder, pattern, data set of the hub, ``-`` for stdin, ``builtin``, or several of these; see
            ``read_rows``.
        tokenizer: a tokenizer of transformers.
        options: which rows and fields, the chat template, the loss, the greatest length.
        say: called about columns that look like an answer and are not read.

    Raises:
        PromptError: the set cannot be read, or no token of it would count.
        MissingLibraryError: parquet and the hub need ``datasets``.
        OptionError: ``chat_template_kwargs`` sets what is not the caller's to set.
    """
    rows = read_first(source, options.limit)
    fields = detect_fields(rows[0][1], options.field, rows[0][0])
    conversations = [fields.read(row, where) for where, row in rows]
    remark = unused_answer(fields, rows, conversations) if options.field is None else None
    if remark is not None:
        say(remark)
    reader = SampleReader(source, rows, fields, conversations, tokenizer, options)
    samples = tuple(filter(None, map(reader.sample, range(len(rows)))))
    return PromptSet(samples, reader.report(samples))


def read_first(source: PromptSource, limit: int | None) -> list[NamedRow]:
    """Read the first rows of a prompt set, or all of them.

    Raises:
        PromptError: the set cannot be read, or has none.
    """
    rows = list(islice(read_rows(source), None if limit is None else min(limit, sys.maxsize)))
    if not rows:
        raise PromptError(f"{short_name(source)}: no prompts in it")
    return rows


def batches(samples: Sequence[Sample], batch_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Return the indices of samples that share a batch: of similar length, shortest first, ties in their own order.

    A batch's padded size, its number of samples times its longest, is at most ``batch_tokens``; a longer sample is a
    batch of its own.
    """
    packed: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i].ids)):
        if packed and (len(packed[-1]) + 1) * len(samples[index].ids) <= batch_tokens:
            packed[-1].append(index)
        else:
            packed.append([index])
    return tuple(map(tuple, packed))
