"""Rows of plain values as text for other programs: TSV, CSV, JSON, JSON lines. Nothing is rounded, cut or left out.

Numbers are written so that reading them gives the same bits. What is not finite, or unknown, is ``null``.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence

from fisherkit.errors import OptionError

Value = str | int | float | None
Record = Mapping[str, Value]

FORMATS = ("tsv", "csv", "json", "jsonl")
# Control characters would break lines and columns, or reach a terminal.
_ESCAPES = str.maketrans({chr(code): f"\\x{code:02x}" for code in (*range(32), 127)} | {"\t": "\\t", "\n": "\\n"})


def render(records: Sequence[Record], columns: Sequence[str], form: str) -> str:
    """Return the records as text that ends with a newline; ``form`` is one of FORMATS, else OptionError is raised.

    TSV and CSV start with a line of column names, also when there are no records. JSON is one array, a record a line.
    """
    rows = [{column: finite(record[column]) for column in columns} for record in records]
    if form == "tsv":
        return "".join(
            "\t".join(line) + "\n" for line in [columns, *([_cell(v) for v in row.values()] for row in rows)]
        )
    if form == "csv":
        return _csv(rows, columns)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    if form == "json":
        return "[" + ",\n ".join(lines) + "]\n"
    if form == "jsonl":
        return "".join(line + "\n" for line in lines)
    raise OptionError(f"--format must be one of {', '.join(FORMATS)}, not {form!r}")


def finite(value: Value) -> Value:
    """Return the value itself, or None for infinities and NaN, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Value) -> str:
    if value is None:
        return "null"
    return value.translate(_ESCAPES) if isinstance(value, str) else repr(value)


def _csv(rows: Sequence[Record], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["null" if v is None else v for v in row.values()] for row in rows)
    return text.getvalue()
