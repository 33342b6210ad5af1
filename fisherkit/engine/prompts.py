"""Prompt sets: from a file, stdin, the hub or the built-in set to samples of token ids.

A *row* is a dict of fields, a *sample* a row's token ids with a mark on each token that counts in the loss. Rows are
read one at a time and no further than ``limit``. In messages, rows and lines count from 1, as editors do.
What a row's fields mean and how they become text is in ``chat``; this module knows no tensors.
"""

import csv
import glob
import hashlib
import importlib
import io
import json
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from fisherkit.engine.chat import (
    Layout,
    Render,
    Rendered,
    Row,
    Talk,
    detect_layout,
    first_line,
    render_chat,
    render_plain,
    template_of,
    tokenise,
)
from fisherkit.errors import MissingLibraryError, OptionError, PromptError
from fisherkit.options import PromptOptions

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[^@:]+))?(@(?P<revision>[^@:]+))?")
_OWN_KWARGS = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"}


@dataclass(frozen=True)
class Sample:
    """One row as the model sees it.

    Attributes:
        row: the row in its source, from 0.
        ids: token ids.
        counts: for each token, whether the loss of predicting it from those before it counts; the first never does.
    """

    row: int
    ids: tuple[int, ...]
    counts: tuple[bool, ...]

    @property
    def loss_tokens(self) -> int:
        """How many tokens count."""
        return sum(self.counts)


@dataclass(frozen=True)
class PromptReport:
    """How a prompt set was read: what goes into an artefact's provenance.

    Attributes:
        source: as given.
        kind: what the first row's fields were taken for, e.g. ``prompt``, ``text``, ``messages``.
        field: the fields that were read, e.g. ``prompt+completion``.
        rows: rows read, skipped ones included.
        samples: rows that became samples.
        tokens: tokens of all samples.
        loss_tokens: those that count.
        skipped: rows that did not become samples.
        skipped_because: their number by reason.
        truncated: samples cut at ``max_length``.
        folded_system: samples whose system turn went into the first user turn, because the template refuses it.
        realigned: samples with a span found in a rendering that rewrites earlier turns (dropped thoughts).
        chat_template: whether the chat template was used.
        loss: which tokens count: ``all``, ``completion`` or ``assistant``.
        max_length: the longest sample allowed, in tokens.
        sha256: over ids and counts of all samples, in order.
        template_sha256: of the chat template; None where none was used.
        chat_template_kwargs: extra variables of the template.
        rows_used: the samples' rows from 0, as ranges: ``0-16,18-199``.
    """

    source: str
    kind: str
    field: str
    rows: int
    samples: int
    tokens: int
    loss_tokens: int
    skipped: int
    skipped_because: dict[str, int]
    truncated: int
    folded_system: int
    realigned: int
    chat_template: bool
    loss: str
    max_length: int
    sha256: str
    template_sha256: str | None
    chat_template_kwargs: dict[str, Any]
    rows_used: str

    def line(self) -> str:
        """All of it that a person wants to know before a long run, in one line."""
        parts = [
            _counted(self.rows, "prompt"),
            f"field {self.field}",
            f"chat template {'on' if self.chat_template else 'off'}",
            f"{self.truncated:,} truncated",
            f"{self.skipped:,} skipped",
            _counted(self.loss_tokens, "loss token"),
        ]
        if self.folded_system:
            parts.append(_counted(self.folded_system, "system turn") + " folded in")
        if self.realigned:
            parts.append(f"{self.realigned:,} realigned")
        return ", ".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class PromptSet:
    """Samples in the order of their rows, and how they were read."""

    samples: tuple[Sample, ...]
    report: PromptReport


def load_prompts(source: str | os.PathLike[str], tokenizer: Any, options: PromptOptions) -> PromptSet:
    """Read a prompt set and tokenise it.

    Args:
        source: a .txt, .jsonl, .json, .csv, .tsv or .parquet file; ``-`` for stdin; ``builtin``; or a data set of
            the hub, ``org/name[:split][@revision]``.
        tokenizer: a tokenizer of transformers.
        options: which rows and fields, the chat template, the loss, the greatest length.

    Raises:
        PromptError: the set cannot be read, or no token of it would count.
        MissingLibraryError: parquet and the hub need ``datasets``.
        OptionError: ``chat_template_kwargs`` sets what is not the caller's to set.
    """
    source = os.fspath(source)
    name = "stdin" if source == "-" else source
    rows = list(islice(read_rows(source), options.limit))
    if not rows:
        raise PromptError(f"{name}: no prompts in it")
    layout = detect_layout(rows[0], options.field, f"{name} row 1")
    talks = [layout.read(row, f"{name} row {n}") for n, row in enumerate(rows, 1)]
    loss, template = _pick_loss(name, layout, talks, options), _pick_template(talks, tokenizer, options)
    reader = _Reader(name, tokenizer, options, loss, template)
    samples = tuple(filter(None, (reader.sample(n, talk) for n, talk in enumerate(talks))))
    if not samples:
        raise PromptError(_nothing_left(name, reader))
    return PromptSet(samples, _report(source, layout, rows, samples, reader))


def batches(samples: Sequence[Sample], batch_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Indices of samples that share a batch: of similar length, shortest first, ties in their own order.

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


# From rows to samples.


def _pick_loss(name: str, layout: Layout, talks: Sequence[Talk], options: PromptOptions) -> str:
    """``auto`` resolved; a loss on answers needs a set that has some."""
    if options.loss == "auto":
        first = next((talk for talk in talks if not talk.empty), talks[0])
        return "completion" if first.answered else "all"
    spoken = any(turn["role"] == "assistant" for talk in talks for turn in talk.turns)
    if options.loss != "all" and not spoken:
        raise PromptError(
            f"{name}: no loss token anywhere: --loss {options.loss} counts answers, and the set has prompts only "
            f"(field {layout.field}); use --loss all"
        )
    return options.loss


def _pick_template(talks: Sequence[Talk], tokenizer: Any, options: PromptOptions) -> Render | None:
    """The template to render with; ``auto`` leaves raw text alone."""
    own = sorted(_OWN_KWARGS & options.chat_template_kwargs.keys())
    if own:
        raise OptionError(f"--chat-template-kwargs must not set {own[0]!r}: that is decided per prompt")
    exists = bool(getattr(tokenizer, "chat_template", None) or options.chat_template_kwargs.get("chat_template"))
    if options.chat_template == "on" and not exists:
        raise PromptError("--chat-template on, but the tokenizer has no chat template; use auto or off")
    if not exists or options.chat_template == "off" or (options.chat_template == "auto" and talks[0].raw):
        return None
    return template_of(tokenizer, options.chat_template_kwargs)


class _Reader:
    """Turns talks into samples and keeps count of what happened to them."""

    def __init__(self, name: str, tokenizer: Any, options: PromptOptions, loss: str, template: Render | None) -> None:
        self.name, self.tokenizer, self.options, self.loss, self.template = name, tokenizer, options, loss, template
        self.skipped: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def sample(self, row: int, talk: Talk) -> Sample | None:
        """The row's sample, or None if it is skipped."""
        made = "empty" if talk.empty else self._make(row, talk)
        if isinstance(made, Sample):
            return made
        self.skipped[made] += 1
        return None

    def _make(self, row: int, talk: Talk) -> Sample | str:
        """The sample, or the reason why there is none."""
        rendered = self._render(talk, f"{self.name} row {row + 1}")
        if rendered.spans is None:
            return "answer not found in the rendered template"
        ids, counts = tokenise(self.tokenizer, rendered, everything=self.loss == "all")
        longest = self.options.max_length
        if not any(counts[:longest]):
            return "cut off before the first loss token" if any(counts) else "without a loss token"
        self.seen.update(truncated=len(ids) > longest, folded=rendered.folded, realigned=rendered.realigned)
        return Sample(row, ids[:longest], counts[:longest])

    def _render(self, talk: Talk, where: str) -> Rendered:
        if self.template is None:
            rendered = render_plain(talk, self.loss)
        else:
            rendered = render_chat(talk, self.loss, self.template, where)
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            broken = rendered.text[error.start]
            raise PromptError(f"{where}: holds {broken!r}, half of a surrogate pair, which is no character") from None
        return rendered


def _nothing_left(name: str, reader: _Reader) -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in reader.skipped.items())
    return (
        f"{name}: no sample left of {_counted(reader.skipped.total(), 'row')} ({reasons}); "
        f"raise --max-length (now {reader.options.max_length}) or use --loss all (now {reader.loss})"
    )


def _report(
    source: str, layout: Layout, rows: Sequence[Row], samples: Sequence[Sample], reader: _Reader
) -> PromptReport:
    return PromptReport(
        source=source,
        kind=layout.kind,
        field=layout.field,
        rows=len(rows),
        samples=len(samples),
        tokens=sum(len(sample.ids) for sample in samples),
        loss_tokens=sum(sample.loss_tokens for sample in samples),
        skipped=reader.skipped.total(),
        skipped_because=dict(reader.skipped),
        truncated=reader.seen["truncated"],
        folded_system=reader.seen["folded"],
        realigned=reader.seen["realigned"],
        chat_template=reader.template is not None,
        loss=reader.loss,
        max_length=reader.options.max_length,
        sha256=_hash_samples(samples),
        template_sha256=_hash_template(reader) if reader.template else None,
        chat_template_kwargs=dict(reader.options.chat_template_kwargs),
        rows_used=_ranges([sample.row for sample in samples]),
    )


def _hash_samples(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(struct.pack(f"<I{len(sample.ids)}I", len(sample.ids), *sample.ids) + bytes(sample.counts))
    return digest.hexdigest()


def _hash_template(reader: _Reader) -> str:
    template = reader.options.chat_template_kwargs.get("chat_template") or reader.tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2,5"``; numbers ascend."""
    starts = [n for n, before in zip(numbers, [None, *numbers], strict=False) if before is None or n != before + 1]
    ends = [n for n, after in zip(numbers, [*numbers[1:], None], strict=True) if after is None or after != n + 1]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))


# From a source to rows.


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a prompt set, one at a time.

    Raises:
        PromptError: the source is missing or malformed; the message names the line.
        MissingLibraryError: ``datasets`` is needed and not installed.
    """
    path = Path(source)
    if source == "builtin":
        text = files("fisherkit.engine").joinpath("builtin_prompts.txt").read_text(encoding="utf-8")
        return _parse_txt(iter(io.StringIO(text)), source)
    if source == "-":
        return _parse_sniffed(_lines(sys.stdin.buffer, "stdin"), "stdin")
    if path.is_dir():
        raise PromptError(f"{source}: is a folder, not a prompt file")
    if path.exists():
        return _file_rows(path)
    name = _HUB_NAME.fullmatch(source)
    if name is None or path.suffix.lower() in {*_PARSERS, ".parquet"} - {""} or source.startswith((".", "/", "~")):
        raise PromptError(f"{source}: no such file")
    kind = "no file here, so a data set of the hub"
    return _dataset_rows(source, kind, lambda datasets: _hub_split(datasets, source, **name.groupdict()))


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _dataset_rows(str(path), "a parquet file", lambda datasets: _parquet(datasets, path))
    if suffix not in _PARSERS:
        known = ", ".join(filter(None, _PARSERS))
        raise PromptError(f"{path}: {suffix} is not a prompt file; known are {known} and .parquet")
    return _text_rows(path, _PARSERS[suffix])


def _text_rows(path: Path, parse: Callable[[Iterator[str], str], Iterator[Row]]) -> Iterator[Row]:
    try:
        with path.open("rb") as stream:
            yield from parse(_lines(stream, str(path)), str(path))
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(stream: IO[bytes], name: str) -> Iterator[str]:
    """Decoded lines with their ends; decoding line by line tells the line of a wrong byte."""
    for number, line in enumerate(stream, 1):
        if b"\0" in line:
            raise PromptError(f"{name} line {number}: has a NUL byte; save the file as UTF-8 text")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            wrong = f"byte {line[error.start]:#04x} at position {error.start + 1}"
            raise PromptError(f"{name} line {number}: not UTF-8 ({wrong}); save the file as UTF-8") from None


def _parse_txt(lines: Iterator[str], name: str) -> Iterator[Row]:
    for line in lines:
        if line.strip():
            yield {"prompt": line.rstrip("\r\n")}


def _parse_jsonl(lines: Iterator[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _as_row(_loads(line.strip(), name, number), f"{name} line {number}")


def _parse_json(lines: Iterator[str], name: str) -> Iterator[Row]:
    """A list of rows, also as ``{"data": [...]}``; or JSON Lines under the wrong name."""
    text = "".join(lines)
    if not text.strip():
        return
    try:
        value = _loads(text, name, 1)
    except PromptError:
        first, _, rest = text.lstrip().partition("\n")
        if not rest or not _is_json_object(first):
            raise
        yield from _parse_jsonl(iter(io.StringIO(text)), name)
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise PromptError(f'{name}: holds neither a list of rows nor {{"data": [...]}}')
    for number, row in enumerate(rows, 1):
        yield _as_row(row, f"{name} row {number}")


def _parse_sniffed(lines: Iterator[str], name: str) -> Iterator[Row]:
    """JSON Lines if the first line that is not blank is a JSON object, else text."""
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    parse = _parse_jsonl if head and _is_json_object(head[-1]) else _parse_txt
    return parse(chain(head, lines), name)


def _parse_csv(lines: Iterator[str], name: str, delimiter: str = ",") -> Iterator[Row]:
    """Rows under a header; a row with more or fewer cells than it is an error, not a cut-off prompt."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise PromptError(
                    f"{name} line {reader.line_num}: {_counted(len(cells), 'cell')} under a header of {len(header)}; "
                    "put text with separators or line breaks in double quotes"
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise PromptError(f"{name} line {reader.line_num}: not valid CSV: {error}") from None


def _parse_tsv(lines: Iterator[str], name: str) -> Iterator[Row]:
    return _parse_csv(lines, name, delimiter="\t")


_PARSERS: dict[str, Callable[[Iterator[str], str], Iterator[Row]]] = {
    "": _parse_sniffed,
    ".txt": _parse_txt,
    ".jsonl": _parse_jsonl,
    ".ndjson": _parse_jsonl,
    ".json": _parse_json,
    ".csv": _parse_csv,
    ".tsv": _parse_tsv,
}


def _loads(text: str, name: str, line: int) -> Any:
    """JSON whose first line is the file's line ``line``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{name} line {line + error.lineno - 1}"
        raise PromptError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise PromptError(f"{name} line {line}: not usable JSON: {first_line(error)}") from None


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _as_row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise PromptError(f"{where}: is {json.dumps(value)[:40]}, not an object with fields")
    return value


def _dataset_rows(source: str, kind: str, load: Callable[[Any], Iterable[Row]]) -> Iterator[Row]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MissingLibraryError("datasets", f"{source}: {kind}, which") from None
    try:
        yield from map(dict, load(datasets))
    except PromptError:
        raise
    except Exception as error:  # datasets passes on what its storage, network and parsers raise
        raise PromptError(f"{source}: {kind} that cannot be read: {first_line(error)}") from error


def _parquet(datasets: Any, path: Path) -> Any:
    # Data files are patterns to datasets; streaming spares a copy in its cache.
    return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)


def _hub_split(datasets: Any, source: str, name: str, split: str | None, revision: str | None, **_: Any) -> Any:
    """A split of a data set of the hub: the one named, ``train``, or the only one."""
    # Streaming fetches no more than the rows that are read, but does not know the cache.
    online = not datasets.config.HF_HUB_OFFLINE
    found = datasets.load_dataset(name, split=split, revision=revision, streaming=online)
    if split is not None:
        return found
    if "train" not in found and len(found) != 1:
        raise PromptError(f"{source}: has the splits {', '.join(found)}; name one as {name}:{next(iter(found))}")
    return found["train"] if "train" in found else next(iter(found.values()))
