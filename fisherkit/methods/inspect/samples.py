"""Samples that ``score --samples`` wrote, the worst first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fisherkit.artefacts.score_samples import read_samples
from fisherkit.errors import OptionError
from fisherkit.methods.inspect.records import Record

_FIGURES = ("tokens", "loss", "difference", "kl", "agreement", "accuracy", "exact", "bits_per_byte")
COLUMNS = ("checkpoint", "set", "row", *_FIGURES, "prompt", "answer")


@dataclass(frozen=True)
class WorstSamples:
    """Rows per checkpoint and sample.

    Attributes:
        rows: columns by name; those that got worse most come first, then those that have nothing to be compared with,
            by their loss.
        columns: in order.
    """

    rows: Sequence[Record]
    columns: tuple[str, ...] = COLUMNS

    def sorted(self, column: str | None = None, top: int | None = None) -> "WorstSamples":
        """Return the same rows sorted by a column, largest first, and cut to the first ``top``.

        A leading ``-`` puts the smallest first. Rows without a value come last. Raises OptionError for a column that
        is not there.
        """
        rows = self.rows
        if column is not None:
            name, ascending = column.removeprefix("-"), column.startswith("-")
            if name not in self.columns:
                raise OptionError(f"--sort {column}: no such column; there are {', '.join(self.columns)}")
            known: list[dict[str, Any]] = [dict(row) for row in rows if row[name] is not None]
            known.sort(key=lambda row: row[name], reverse=not ascending)
            rows = [*known, *(row for row in rows if row[name] is None)]
        return replace(self, rows=rows[:top])


def worst_samples(path: Path) -> WorstSamples:
    """Read the samples of a score.

    Raises:
        CheckpointError: the file is damaged; the message names the line.
    """
    rows = sorted(read_samples(path), key=_badness)
    return WorstSamples([{column: row[column] for column in COLUMNS} for row in rows])


def _badness(row: dict[str, Any]) -> tuple[bool, float]:
    compared = row["difference"] is not None
    return not compared, -(row["difference"] if compared else row["loss"])
