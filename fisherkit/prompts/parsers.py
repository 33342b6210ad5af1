"""Text formats of prompt files: decoded lines in, rows out, one at a time.

In messages, rows and lines count from 1, as editors do.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import IO, Any

from fisherkit.errors import PromptError, first_line
from fisherkit.prompts.turns import Row
from fisherkit.prompts.wording import clipped, counted, type_name

Parse = Callable[[Iterator[str], str], Iterator[Row]]

LONGEST_LINE = 64 * 2**20  # bytes; a longer line is no prompt but a file without line ends
LARGEST_JSON = 2**31  # characters of a .json file, which is read as a whole


def decoded_lines(stream: IO[bytes], name: str, longest: int = LONGEST_LINE) -> Iterator[str]:
    """Decode a stream line by line, ends included, so that a message can name the line of a wrong byte.

    Args:
        stream: of UTF-8, with or without a byte order mark.
        name: of the file, for messages.
        longest: bytes of a line above which it is refused.

    Raises:
        PromptError: not UTF-8, a NUL byte, or a line that is too long.
    """
    for number, line in enumerate(iter(lambda: stream.readline(longest + 1), b""), 1):
        if len(line) > longest:
            raise PromptError(f"{name} line {number}: is longer than {longest >> 20} MiB; put each row on a line")
        if b"\0" in line:
            raise PromptError(f"{name} line {number}: has a NUL byte; save the file as UTF-8 text")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            wrong = f"byte {line[error.start]:#04x} at position {error.start + 1}"
            raise PromptError(f"{name} line {number}: not UTF-8 ({wrong}); save the file as UTF-8") from None


def parse_txt(lines: Iterator[str], name: str) -> Iterator[Row]:
    """Read a prompt from each line that is not blank."""
    for line in lines:
        if line.strip():
            yield {"prompt": line.rstrip("\r\n")}


def parse_jsonl(lines: Iterator[str], name: str) -> Iterator[Row]:
    """Read a JSON object, or a text, from each line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _as_row(_loads(line.strip(), name, number), f"{name} line {number}")


def parse_json(lines: Iterator[str], name: str) -> Iterator[Row]:
    """Read a list of rows, also as ``{"data": [...]}``; or JSON Lines under the wrong name."""
    text = _joined(lines, name)
    if not text.strip():
        return
    try:
        value = _loads(text, name, 1)
    except PromptError:
        first, _, rest = text.lstrip().partition("\n")
        if not rest or not _is_json_object(first):
            raise
        yield from parse_jsonl(iter(io.StringIO(text)), name)
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise PromptError(f'{name}: holds neither a list of rows nor {{"data": [...]}}')
    for number, row in enumerate(rows, 1):
        yield _as_row(row, f"{name} row {number}")


def parse_sniffed(lines: Iterator[str], name: str) -> Iterator[Row]:
    """Read JSON Lines if the first line that is not blank is a JSON object, else text."""
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    parse = parse_jsonl if head and _is_json_object(head[-1]) else parse_txt
    return parse(chain(head, lines), name)


def parse_csv(lines: Iterator[str], name: str, delimiter: str = ",") -> Iterator[Row]:
    """Read rows under a header; a row with more or fewer cells than it is an error, not a cut-off prompt."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        first = next(reader, [])
        header, head = ([*_MMLU], [first]) if _is_mmlu(first) else ([cell.strip() for cell in first], [])
        for cells in filter(None, chain(head, reader)):
            if len(cells) != len(header):
                raise PromptError(
                    f"{name} line {reader.line_num}: {counted(len(cells), 'cell')} under a header of {len(header)}; "
                    "put text with separators or line breaks in double quotes"
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise PromptError(f"{name} line {reader.line_num}: not valid CSV: {error}") from None


def parse_tsv(lines: Iterator[str], name: str) -> Iterator[Row]:
    """Read rows under a header, with tabs between cells."""
    return parse_csv(lines, name, delimiter="\t")


PARSERS: dict[str, Parse] = {
    "": parse_sniffed,
    ".txt": parse_txt,
    ".jsonl": parse_jsonl,
    ".ndjson": parse_jsonl,
    ".json": parse_json,
    ".csv": parse_csv,
    ".tsv": parse_tsv,
}

_MMLU = ("question", "A", "B", "C", "D", "answer")


def _is_mmlu(cells: list[str]) -> bool:
    """Tell the first question of MMLU's files, which have no header, from a header."""
    return len(cells) == len(_MMLU) and cells[-1].strip() in ("A", "B", "C", "D")


def _joined(lines: Iterator[str], name: str) -> str:
    pieces, length = [], 0
    for line in lines:
        pieces.append(line)
        length += len(line)
        if length > LARGEST_JSON:
            raise PromptError(f"{name}: more than {LARGEST_JSON >> 30} GiB as one JSON value; save it as JSON Lines")
    return "".join(pieces)


def _loads(text: str, name: str, line: int) -> Any:
    """Parse JSON whose first line is the file's line ``line``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{name} line {line + error.lineno - 1}"
        raise PromptError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise PromptError(f"{name} line {line}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # numbers of thousands of digits
        raise PromptError(f"{name} line {line}: not usable JSON: {clipped(first_line(error), 120)}") from None


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _as_row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        shown = str(value) if isinstance(value, int | float) else type_name(value)
        raise PromptError(f"{where}: is {shown[:40]}, not an object with fields")
    return value
