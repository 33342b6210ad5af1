"""Plain text in windows of tokens, for corpora that were held out.

A .txt file is one text; of every other set each row is one. A window begins with the last token of the one before it,
so that every token but the first of a text is predicted exactly once, from at most window - 1 tokens before it. (So
does lm-evaluation-harness in its rolling log-likelihoods.) No window spans two texts.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fisherkit.errors import PromptError
from fisherkit.options import PromptOptions
from fisherkit.prompts.compression import split_compression
from fisherkit.prompts.dataset import PromptSet, Sample, read_first
from fisherkit.prompts.known_sets import detect_fields
from fisherkit.prompts.report import PromptReport, hash_samples, ranges
from fisherkit.prompts.sources import (
    PromptSource,
    input_files,
    read_rows,
    short_name,
    source_name,
    source_names,
    text_of_file,
)
from fisherkit.prompts.templates import Rendered
from fisherkit.prompts.tokenise import Tokens, tokenise

_EVERYTHING = 1 << 40  # tokens


def is_plain_text(source: PromptSource, field: str | None) -> bool:
    """Return whether a set holds texts to go on with, not prompts: a .txt file, or rows of a text column.

    Args:
        source: see load_prompts; not stdin, which can be read once only.
        field: the column that is read, if one was named.
    """
    names = source_names(source)
    if "-" in names:
        return False
    if any(map(_text_files, names)):
        return True
    where, row = read_first(source, 1)[0]
    return detect_fields(row, field, where).kind == "text" and not isinstance(row.get("text"), list)


def load_windows(source: PromptSource, window: int, tokenizer: Any, options: PromptOptions) -> PromptSet:
    """Read a set of plain text in windows; every token but the first of a window counts.

    Args:
        source: see load_prompts.
        window: tokens of a window; the last one of a text may be shorter.
        tokenizer: of transformers; what it puts before a text (BOS) stands before the first window of each.
        options: ``field`` names the column, ``limit`` is the number of windows.

    Raises:
        PromptError: the set cannot be read, or has no text of two tokens.
    """
    samples = tuple(islice(_windows(source, window, tokenizer, options), options.limit))
    if not samples:
        raise PromptError(f"{short_name(source)}: no text of two tokens or more in it")
    return PromptSet(samples, _report(source, window, samples))


def _windows(source: PromptSource, window: int, tokenizer: Any, options: PromptOptions) -> Iterator[Sample]:
    step, made = window - 1, 0
    for where, text in _texts(source, options.field):
        longest = _EVERYTHING if options.limit is None else (options.limit - made) * step + 1
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError(f"{where}: holds half of a surrogate pair, which is no character") from None
        tokens = tokenise(tokenizer, Rendered(text, (), templated=False), everything=True, longest=longest)
        for start in range(0, len(tokens.ids) - 1, step):
            place = slice(start, start + window)
            ids, ends = tokens.ids[place], tokens.ends[place]
            part = Tokens(ids, (False, *[True] * (len(ids) - 1)), ends)
            yield Sample(made, part.ids, part.counts, part.counted_bytes(text, tokenizer))
            made += 1


def _texts(source: PromptSource, field: str | None) -> Iterator[tuple[str, str]]:
    """Yield texts with where they stand."""
    for name in source_names(source):
        files = _text_files(name)
        if files:
            texts = ((str(path), text_of_file(path)) for path in files)
            yield from ((where, text) for where, text in texts if text.strip())
            continue
        fields = None
        for where, row in read_rows(name):
            fields = fields or detect_fields(row, field, where)
            text = "\n\n".join(turn["content"] for turn in fields.read(row, where).turns)
            if text.strip():
                yield where, text


def _text_files(name: str) -> list[Path]:
    """Return the files that a name stands for, if all of them are .txt; else none."""
    files = input_files(name)
    return files if all(split_compression(path)[0] == ".txt" for path in files) else []


def _report(source: PromptSource, window: int, samples: tuple[Sample, ...]) -> PromptReport:
    return PromptReport(
        source=source_name(source),
        kind="windows",
        field="text",
        rows=len(samples),
        samples=len(samples),
        tokens=sum(len(sample.ids) for sample in samples),
        loss_tokens=sum(sample.loss_tokens for sample in samples),
        skipped=0,
        skipped_because={},
        truncated=0,
        folded_system=0,
        realigned=0,
        chat_template=False,
        loss="all",
        max_length=window,
        sha256=hash_samples((sample.ids, sample.counts) for sample in samples),
        template_sha256=None,
        chat_template_kwargs={},
        rows_used=ranges([sample.row for sample in samples]),
    )
