"""Sources of prompts: files, folders, patterns, stdin, the hub or the built-in set, as rows with their names."""

import glob
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path

from fisherkit.errors import PromptError, first_line
from fisherkit.prompts.compression import BROKEN, CODECS, open_bytes, split_compression
from fisherkit.prompts.dataset_library import TABLES, hub_rows, is_saved, saved_rows, table_rows
from fisherkit.prompts.folders import data_files
from fisherkit.prompts.parsers import LARGEST_JSON, LONGEST_LINE, PARSERS, decoded_lines, parse_sniffed, parse_txt
from fisherkit.prompts.threads import is_message, threads
from fisherkit.prompts.turns import Row
from fisherkit.prompts.wording import clipped

PromptSource = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
NamedRow = tuple[str, Row]  # where it stands, as messages say it, and its columns

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[^@:]+))?(@(?P<revision>[^@:]+))?")


def source_name(source: PromptSource) -> str:
    """Name a prompt set in one line: as it was given, or its first file and how many more there are."""
    names = source_names(source)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more" if names else "nothing"


def short_name(source: PromptSource) -> str:
    """Name a prompt set in a message."""
    return "stdin" if source_name(source) == "-" else clipped(source_name(source), 150)


def source_names(source: PromptSource) -> list[str]:
    """Return each file, folder, pattern or data set of a prompt set, as it was given."""
    return [os.fspath(source)] if isinstance(source, str | os.PathLike) else [os.fspath(one) for one in source]


def input_files(source: PromptSource) -> list[Path]:
    """List the files of this machine that a prompt set is read from; of a saved data set, its folder."""
    found: list[Path] = []
    for name in source_names(source):
        folder, split = _folder_and_split(name)
        if folder is not None:
            found += [folder] if is_saved(folder) else data_files(folder, split)
        elif os.path.exists(name):
            found.append(Path(name))
        else:
            found += [Path(path) for path in _matches(name)]
    return found


def read_rows(source: PromptSource) -> Iterator[NamedRow]:
    """Read the rows of a prompt set, one at a time.

    Args:
        source: a .txt, .jsonl, .json, .csv, .tsv, .parquet or .arrow file, also as .gz, .bz2, .xz or .zst; a folder of
            them or of ``save_to_disk``, ``folder[:split]``; a pattern such as ``data/*.jsonl``; ``-`` for stdin;
            ``builtin``; a data set of the hub, ``org/name[:split][@revision]``; or several of these.

    Raises:
        PromptError: the source is missing or malformed; the message names the line.
        MissingLibraryError: tables and the hub need ``datasets``, .zst its codec.
    """
    rows: Iterator[NamedRow] = chain.from_iterable(map(_named_rows, source_names(source)))
    first = next(rows, None)
    if first is None:
        return
    rows = chain([first], rows)
    if is_message(first[1]):
        name = source_name(source)
        rows = ((f"{name} thread {n}", row) for n, row in enumerate(threads(row for _, row in rows), 1))
    yield from rows


def _named_rows(source: str) -> Iterator[NamedRow]:
    if source == "builtin":
        text = files("fisherkit.prompts").joinpath("builtin_prompts.txt").read_text(encoding="utf-8")
        return _numbered(source, parse_txt(iter(io.StringIO(text)), source))
    if source == "-":
        return _numbered("stdin", parse_sniffed(decoded_lines(sys.stdin.buffer, "stdin"), "stdin"))
    folder, split = _folder_and_split(source)
    if folder is not None:
        return _folder_rows(source, folder, split)
    if os.path.exists(source):  # a pipe too
        return _numbered(source, _file_rows(Path(source)))
    return _pattern_rows(source) if glob.has_magic(source) else _hub_rows(source)


def _folder_and_split(source: str) -> tuple[Path | None, str | None]:
    """``data`` -> ``(data, None)``, ``data:test`` -> ``(data, "test")``; no folder where there is none."""
    if os.path.isdir(source):
        return Path(source), None
    folder, _, split = source.rpartition(":")
    return (Path(folder), split) if folder and os.path.isdir(folder) else (None, None)


def _folder_rows(source: str, folder: Path, split: str | None) -> Iterator[NamedRow]:
    if is_saved(folder):
        return _numbered(source, saved_rows(folder, split))
    return chain.from_iterable(_numbered(str(path), _file_rows(path)) for path in data_files(folder, split))


def _pattern_rows(pattern: str) -> Iterator[NamedRow]:
    paths = _matches(pattern)
    if not paths:
        raise PromptError(f"{pattern}: no file fits the pattern")
    return chain.from_iterable(_numbered(path, _file_rows(Path(path))) for path in paths)


def _matches(pattern: str) -> list[str]:
    return [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]


def _hub_rows(source: str) -> Iterator[NamedRow]:
    name = _HUB_NAME.fullmatch(source)
    suffixes = {*PARSERS, *TABLES, *CODECS} - {""}
    if (
        name is None
        or len(source) > 200
        or Path(source).suffix.lower() in suffixes
        or source.startswith((".", "/", "~"))
    ):
        raise PromptError(f"{clipped(source, 200)}: no such file")
    return _numbered(source, hub_rows(source, name["name"], name["split"], name["revision"]))


def _file_rows(path: Path) -> Iterator[Row]:
    """Read one file by its suffix; one without any is sniffed."""
    suffix, codec = split_compression(path)
    if suffix in TABLES and not codec:
        yield from table_rows(path)
        return
    if suffix not in PARSERS:
        known = ", ".join(filter(None, PARSERS))
        raise PromptError(f"{path}: {suffix} is not a prompt file; known are {known} and {' and '.join(TABLES)}")
    longest = LARGEST_JSON if suffix == ".json" else LONGEST_LINE
    try:
        with open_bytes(path) as stream:
            yield from PARSERS[suffix](decoded_lines(stream, str(path), longest), str(path))
    except BROKEN as error:
        raise _unreadable(path, error) from error


def text_of_file(path: Path) -> str:
    """Return all of a text file, decompressed.

    Raises:
        PromptError: it cannot be read, or is no text in UTF-8.
    """
    try:
        with open_bytes(path) as stream:
            return "".join(decoded_lines(stream, str(path), LARGEST_JSON))
    except BROKEN as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> PromptError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return PromptError(f"{path}: cannot be read: {clipped(reason, 120)}")


def _numbered(name: str, rows: Iterator[Row]) -> Iterator[NamedRow]:
    return ((f"{name} row {n}", row) for n, row in enumerate(rows, 1))
