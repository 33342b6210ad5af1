"""Tables of a score on the terminal: checkpoints against prompt sets, and below them all figures of each.

A change against the first checkpoint is red where it is worse, green where it is better, and grey where its interval
holds zero. What is worse has a plus: losses grow.
"""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fisherkit.methods.inspect.samples import WorstSamples
from fisherkit.methods.score.report import CheckpointScore, ScoreReport, SetScore
from fisherkit.render import formatting

_MOST_SAMPLES = 20
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
    console.print(_losses(report))
    console.print()
    console.print(_figures(report))


def draw_samples(samples: WorstSamples, console: Console, *, every: bool) -> None:
    """Print samples of a score with the start of what they say.

    Args:
        samples: the worst first.
        console: the terminal.
        every: all of them, not only the first.
    """
    rows = samples.rows if every else samples.rows[:_MOST_SAMPLES]
    table = _table("checkpoint")
    table.add_column("set", overflow="fold")
    for heading in ("row", "tokens", "loss", "change", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis")
    for row in rows:
        change = row["difference"]
        table.add_row(
            Text(formatting.printable(str(row["checkpoint"]))),
            Text(formatting.printable(str(row["set"]))),
            str(row["row"]),
            str(row["tokens"]),
            formatting.number(row["loss"]),
            f"{change:+.4f}" if isinstance(change, float) else "-",
            formatting.number(row["kl"]),
            Text(formatting.printable(" ".join(f"{row['prompt']}{row['answer']}".split()))),
        )
    console.print(table)
    if len(rows) < len(samples.rows):
        console.print(Text(f"\n{len(rows)} of {len(samples.rows):,} rows; --top N shows more", style="dim"))


def _losses(report: ScoreReport) -> Table:
    table = _table("checkpoint")
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


def _figures(report: ScoreReport) -> Table:
    """Return a row per set and checkpoint; columns that are empty throughout are left out."""
    rows = [(name, checkpoint, _cells(checkpoint, name)) for name in report.sets for checkpoint in report.checkpoints]
    filled = [heading for heading in rows[0][2] if any(cells[heading] != "-" for _, _, cells in rows)]
    table = _table("set")
    table.add_column("checkpoint", overflow="fold", style="cyan")
    for heading in filled:
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for name, checkpoint, cells in rows:
        label = formatting.printable(name) if name != before else ""
        table.add_row(Text(label), Text(formatting.printable(checkpoint.name)), *(cells[heading] for heading in filled))
        before = name
    return table


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


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold", style="cyan", min_width=len(first))
    return table
