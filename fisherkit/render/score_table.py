"""Tables of a score on the terminal: checkpoints against prompt sets, and below them all figures of each.

A change against the first checkpoint is red where it is worse, green where it is better, and grey where its interval
holds zero. What is worse has a plus: losses grow.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fisherkit.methods.inspect.samples import WorstSamples
from fisherkit.methods.score.report import CheckpointScore, ScoreReport, SetScore
from fisherkit.render import formatting

_MOST_SAMPLES = 20
_GAP = 2  # between columns
_NAME_SHARE = 4  # of the width, for a column of names at most; longer ones fold
_LEAST_TEXT = 12  # of a sample's text
_SAMPLE_COLUMNS = ("row", "tokens", "loss", "change", "KL")
_SPARED = ("by length", "agree", "bits/byte", "perplexity", "token acc")
"""Columns that a narrow terminal goes without, in this order."""
_UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}


def draw_score(report: ScoreReport, console: Console) -> None:
    """Print both tables.

    Args:
        report: of score.
        console: the terminal.
    """
    several = len(report.checkpoints) > 1
    first = formatting.printable(report.checkpoints[0].name)
    against = f"; changes against {first}" if several else ""
    console.print(Text(f"Loss in {_UNITS[report.measure]}, with 95 % intervals over samples{against}", style="bold"))
    console.print()
    console.print(_losses(report, console.width))
    console.print()
    table, left_out = _figures(report, console.width)
    console.print(table)
    if left_out:
        console.print(Text(f"\n{', '.join(left_out)}: in a wider window, or in a pipe", style="dim"))


def draw_samples(samples: WorstSamples, console: Console, *, every: bool) -> None:
    """Print samples of a score with the start of what they say.

    Args:
        samples: the worst first.
        console: the terminal.
        every: all of them, not only the first.
    """
    rows = samples.rows if every else samples.rows[:_MOST_SAMPLES]
    cells = [_sample_cells(row) for row in rows]
    headings = enumerate(("checkpoint", "set"))
    named = [_name_width(heading, (row[at] for row in cells), console.width) for at, heading in headings]
    numbers = [_width(heading, (row[at] for row in cells)) for at, heading in enumerate(_SAMPLE_COLUMNS, start=2)]
    room = max(_LEAST_TEXT, console.width - sum(named) - sum(numbers) - _GAP * (len(named) + len(numbers)))
    table = _table("checkpoint", named[0])
    table.add_column("set", overflow="fold", min_width=named[1])
    for heading in _SAMPLE_COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=room)
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)
    if len(rows) < len(samples.rows):
        console.print(Text(f"\n{len(rows)} of {len(samples.rows):,} rows; --top N shows more", style="dim"))


def _losses(report: ScoreReport, width: int) -> Table:
    names = [formatting.printable(checkpoint.name) for checkpoint in report.checkpoints]
    table = _table("checkpoint", _name_width("checkpoint", names, width))
    for name in report.sets:
        table.add_column(formatting.printable(name), justify="right", no_wrap=True)
        if len(report.checkpoints) > 1:
            table.add_column("change", justify="right", no_wrap=True)
    for checkpoint in report.checkpoints:
        cells = []
        for name in report.sets:
            value, ci95 = report.value(checkpoint, name)
            cells.append(Text(_with_interval(value, ci95)))
            if len(report.checkpoints) > 1:
                cells.append(_change(checkpoint.sets[name]))
        table.add_row(Text(formatting.printable(checkpoint.name)), *cells)
    return table


def _figures(report: ScoreReport, width: int) -> tuple[Table, list[str]]:
    """Return a row per set and checkpoint, and the columns that the width has no room for.

    Columns that are empty throughout are left out without a word.
    """
    rows = [(name, checkpoint, _cells(checkpoint, name)) for name in report.sets for checkpoint in report.checkpoints]
    filled = [heading for heading in rows[0][2] if any(cells[heading] != "-" for _, _, cells in rows)]
    names = [formatting.printable(checkpoint.name) for checkpoint in report.checkpoints]
    sets = map(formatting.printable, report.sets)
    named = [_name_width("set", sets, width), _name_width("checkpoint", names, width)]
    widths = {heading: _width(heading, (cells[heading] for _, _, cells in rows)) for heading in filled}
    left_out: list[str] = []
    for heading in [one for one in _SPARED if one in widths]:
        if sum(named) + sum(widths.values()) + _GAP * (len(named) + len(widths)) > width:
            del widths[heading]
            left_out.append(heading)
    table = _table("set", named[0])
    table.add_column("checkpoint", overflow="fold", style="cyan", min_width=named[1])
    for heading in widths:
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for name, checkpoint, cells in rows:
        label = formatting.printable(name) if name != before else ""
        table.add_row(Text(label), Text(formatting.printable(checkpoint.name)), *(cells[one] for one in widths))
        before = name
    return table, left_out


def _cells(checkpoint: CheckpointScore, name: str) -> dict[str, str]:
    found = checkpoint.sets[name]
    change, choices = found.change, found.choices
    return {
        "perplexity": formatting.number(found.perplexity),
        "token acc": formatting.percent(found.accuracy),
        "exact": formatting.percent(found.exact),
        "bits/byte": formatting.number(found.bits_per_byte),
        "choice": formatting.percent(choices.accuracy if choices else None),
        "by length": formatting.percent(choices.accuracy_norm if choices else None),
        "KL": formatting.number(change.kl if change else None),
        "agree": formatting.percent(change.agreement if change else None),
        "worse": formatting.percent(change.worse if change else None),
    }


def _change(found: SetScore) -> Text:
    change = found.change
    if change is None:
        return Text("")
    text = f"{change.difference:+.4f}" + (f" ±{change.ci95:.4f}" if change.ci95 is not None else "")
    if change.ci95 is None or abs(change.difference) <= change.ci95:
        return Text(text, style="dim")
    return Text(text, style="red" if change.difference > 0 else "green")


def _with_interval(value: float | None, ci95: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ±{ci95:.4f}" if ci95 is not None else "")


def _sample_cells(row: Mapping[str, Any]) -> list[str]:
    change = row["difference"]
    return [
        formatting.printable(str(row["checkpoint"])),
        formatting.printable(str(row["set"])),
        str(row["row"]),
        str(row["tokens"]),
        formatting.number(row["loss"]),
        f"{change:+.4f}" if isinstance(change, float) else "-",
        formatting.number(row["kl"]),
        formatting.printable(" ".join(f"{row['prompt']}{row['answer']}".split())),
    ]


def _width(heading: str, cells: Iterable[str]) -> int:
    """Return the cells of the terminal that a column takes."""
    return max(cell_len(heading), *map(cell_len, cells))


def _name_width(heading: str, names: Iterable[str], width: int) -> int:
    """Return the same for a column of names, which fold where they are long, in a table of this width."""
    return max(cell_len(heading), min(width // _NAME_SHARE, _width(heading, names)))


def _table(first: str, width: int | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold", style="cyan", min_width=width or len(first))
    return table
