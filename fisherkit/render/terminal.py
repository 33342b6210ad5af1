"""View of a summary on the terminal: a table with bars, the mass in words, and a layer x module heat map.

Colours where the terminal has them, characters where it does not, ASCII where the encoding has no others. Fits 80
columns; names are folded, never cut.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from rich.cells import cell_len
from rich.color import Color
from rich.columns import Columns
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from fisherkit.methods.inspect.heat_map import HeatMap
from fisherkit.methods.inspect.records import Record
from fisherkit.methods.inspect.rows import SummaryRow
from fisherkit.methods.inspect.summary import Summary
from fisherkit.render import formatting, summary_text

_MOST_CELL, _LEAST_CELL = 8, 2
_BAR_LEAST = 6
_MOST_GROUPS = 12
_HEADINGS = {"rank_correlation": "rank corr", "overlap_10": "top 10%", "overlap_30": "top 30%"}
_SHARES = ("mask", "subspace")
_DISPENSABLE = ("tensors", "weights", "so far")  # dropped in this order where names would not fit


@dataclass(frozen=True)
class _Marks:
    """Characters that a terminal can show.

    Attributes:
        bar: a full step of a bar.
        shades: five levels, lowest first.
        missing: no such tensor.
        dead: a tensor that is zero throughout.
    """

    bar: str
    shades: str
    missing: str
    dead: str = "0"


_BLOCKS = _Marks("█", " ░▒▓█", "·")
_ASCII = _Marks("#", " .:*#", "-")


def draw(summary: Summary, console: Console, *, every: bool = False) -> None:
    """Print the whole view of a summary.

    Args:
        summary: of a file.
        console: the terminal.
        every: a row for every layer, where many would fold into groups, so that the head stays in sight.
    """
    marks, layers = _marks(console), len(summary.heat.layers)
    if not every:
        summary = summary.folded(_MOST_GROUPS)
    console.print(Text(summary_text.headline(summary), style="bold"))
    if summary.provenance:
        console.print(Text(_made(summary), style="dim"))
    console.print()
    console.print(_table(summary, marks, console.width))
    if summary.heat.last:
        console.print(
            Text(f"\n{layers} layers in {len(summary.heat.layers)} groups; --all shows every one", style="dim")
        )
    for sentence in summary_text.sentences(summary):
        console.print(Text(f"\n{sentence}"))
    if len(summary.heat.means) > 1 and not summary.heat.is_flat:
        console.print()
        for line in _heat_map(summary.heat, marks, console.width, coloured=_has_colour(console)):
            console.print(line, soft_wrap=isinstance(line, Text))  # a map is for the terminal to wrap
    for warning in summary_text.warnings(summary):
        console.print(Text(f"\nwarning: {warning}", style="bold red"))


def draw_rows(rows: Sequence[Record], columns: Sequence[str], console: Console) -> None:
    """Print plain rows under their columns' names, numbers in four digits."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for at, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="right" if at else "left", style="" if at else "cyan")
    for row in rows:
        table.add_row(*(Text(formatting.printable(formatting.number(row[column]))) for column in columns))
    console.print(table)


def _marks(console: Console) -> _Marks:
    try:
        "█░▒▓·".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _BLOCKS


def _has_colour(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _made(summary: Summary) -> str:
    """Say in one line how a Fisher was estimated."""
    made = summary.provenance or {}
    estimator, prompts, run = (made.get(section, {}) for section in ("estimator", "prompts", "run"))
    known = (
        ("estimator", estimator.get("name")),
        ("labels", estimator.get("labels")),
        ("loss", prompts.get("loss")),
        ("reduction", estimator.get("reduction")),
        ("engine", run.get("engine")),
        ("stored", run.get("store")),
    )
    return formatting.printable(", ".join(f"{name} {value}" for name, value in known if value is not None))


# The table


def _table(summary: Summary, marks: _Marks, width: int) -> Table:
    labels = [
        Text(summary_text.row_label(row, summary.by), style="red" if row.nonfinite else "") for row in summary.rows
    ]
    columns = _columns(summary)
    named = max([len(summary.by), *(label.cell_len for label in labels)]) + 2
    for heading in _DISPENSABLE:
        if named + _width(columns) > width:
            columns.pop(heading, None)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(summary.by, overflow="fold", style="cyan", min_width=len(summary.by))
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    bars = _bars(summary, marks, width - named - _width(columns))
    if bars:
        table.add_column("", no_wrap=True)
    for place, label in enumerate(labels):
        table.add_row(label, *(Text(cells[place]) for cells in columns.values()), *bars[place : place + 1])
    return table


def _width(columns: Mapping[str, list[str]]) -> int:
    return sum(max(map(cell_len, [heading, *cells])) + 2 for heading, cells in columns.items())


def _columns(summary: Summary) -> dict[str, list[str]]:
    """Return headings and cells, the name and the bar left out."""
    rows, there = summary.rows, set(summary.columns)
    columns: dict[str, list[str]] = {}
    if "tensors" in there and summary.by != "tensor":
        columns["tensors"] = [str(row.tensors) for row in rows]
    if "weights" in there:
        columns["weights"] = [formatting.count(row.weights) for row in rows]
    for name in ("rank", "mean", "density", "energy", "effective_rank") if "weights" in there else ("sum",):
        if name in there:
            columns[name.replace("_", " ")] = [formatting.number(summary.value(row, name)) for row in rows]
    if "share" in there:
        columns["share"] = [formatting.percent(_share(row)) for row in rows]
    if summary.comparison:
        for name in summary.comparison.columns:
            columns[_HEADINGS.get(name, name)] = [_agreement(summary, row, name) for row in rows]
    elif "share" in there:
        columns["so far"] = [formatting.percent(share) for share in accumulate(_share(row) or 0.0 for row in rows)]
    if summary.total.nonfinite:
        columns["not finite"] = [f"{row.nonfinite:,}" for row in rows]
    return columns


def _level(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _share(row: SummaryRow) -> float | None:
    return row.share if row.share == row.share else None


def _agreement(summary: Summary, row: SummaryRow, name: str) -> str:
    value = summary.value(row, name)
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _bars(summary: Summary, marks: _Marks, room: int) -> list[Text]:
    """Return a bar per row, as long as its share (density for a mask); none where there is no room."""
    if room < _BAR_LEAST or not summary.rows:
        return []
    values = [_level(row.mean if summary.kind in _SHARES else row.share) for row in summary.rows]
    longest = 1.0 if summary.kind in _SHARES else max(values) or 1.0
    room = min(room, 40)
    return [Text(marks.bar * round(room * value / longest), style="green") for value in values]


# The heat map


def _heat_map(heat: HeatMap, marks: _Marks, width: int, *, coloured: bool) -> Iterator[Text | Columns]:
    """Yield a line per layer, modules side by side; in several panels where they do not fit, then the legend."""
    margin = max(len(heat.label(layer)) for layer in heat.layers) + 1
    cell, per_panel = _cells(heat, width - margin)
    short = formatting.short_names(heat.modules)
    keyed = any(len(name) > cell - 1 for name in short.values())
    headings = [str(place + 1) if keyed else short[name] for place, name in enumerate(heat.modules)]
    for start in range(0, len(heat.modules), per_panel):
        panel = slice(start, start + per_panel)
        yield Text(" " * margin + "".join(heading[:cell].ljust(cell) for heading in headings[panel]), style="bold")
        for layer in heat.layers:
            line = Text(f"{heat.label(layer):>{margin - 1}} ")
            for module in heat.modules[panel]:
                line.append_text(_cell(heat, layer, module, cell, marks, coloured=coloured))
            yield line
    if keyed:
        key = (f"{number} {formatting.printable(name)}" for number, name in zip(headings, heat.modules, strict=True))
        yield Columns(map(Text, key), padding=(0, 2))
    yield _legend(heat, marks, coloured=coloured)


def _cells(heat: HeatMap, room: int) -> tuple[int, int]:
    """Return the width of a cell, and how many of them stand side by side."""
    count = len(heat.modules)
    cell = min(max(room // count, _LEAST_CELL), _MOST_CELL)
    if cell <= len(str(count)):  # numbers of modules must fit
        cell = len(str(count)) + 1
    return cell, max(1, min(count, room // cell))


def _cell(heat: HeatMap, layer: int, module: str, width: int, marks: _Marks, *, coloured: bool) -> Text:
    level = heat.level(layer, module)
    if (layer, module) not in heat.means:
        return Text(marks.missing.ljust(width), style="dim")
    if level is None:
        return Text(marks.dead.ljust(width), style="bold red")
    return _shade(level, width, marks, coloured=coloured)


def _shade(level: float, width: int, marks: _Marks, *, coloured: bool) -> Text:
    if coloured:
        return Text(" " * width, style=Style(bgcolor=Color.from_rgb(*formatting.colour(level))))
    shade = marks.shades[min(int(level * len(marks.shades)), len(marks.shades) - 1)]
    return Text((shade * max(1, width - 1)).ljust(width))  # a gap shows where a cell ends


def _legend(heat: HeatMap, marks: _Marks, *, coloured: bool) -> Text:
    ends: Sequence[str] = ["none", "none"] if heat.bounds is None else [formatting.number(end) for end in heat.bounds]
    what = heat.measure if heat.linear else "mean, log scale"
    line = Text(f"{what}: {ends[0]} ")
    steps = 12 if coloured else len(marks.shades)
    for step in range(steps):
        line.append_text(_shade(step / (steps - 1), 1, marks, coloured=coloured))
    return line.append(f" {ends[1]}   {marks.missing} no such tensor   {marks.dead} all zero")
