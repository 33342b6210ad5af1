"""Where prompts come from: a file, stdin, the hub or the built-in set to rows, one at a time.

A *row* is a dict of fields. In messages, rows and lines count from 1, as editors do.
"""

import csv
import glob
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import IO, Any

from fisherkit.errors import MissingLibraryError, PromptError, first_line
from fisherkit.prompts.fields import Row

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[^@:]+))?(@(?P<revision>[^@:]+))?")


def counted(number: int, noun: str) -> str:
    """``(1, "row")`` -> ``"1 row"``, ``(1234, "row")`` -> ``"1,234 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a prompt set, one at a time.

    Raises:
        PromptError: the source is missing or malformed; the message names the line.
        MissingLibraryError: ``datasets`` is needed and not installed.
    """
    path = Path(source)
    if source == "builtin":
        text = files("fisherkit.prompts").joinpath("builtin_prompts.txt").read_text(encoding="utf-8")
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
                    f"{name} line {reader.line_num}: {counted(len(cells), 'cell')} under a header of {len(header)}; "
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
