"""Which settings of a method learn the sequence: the two best after one task, by one rule for all methods."""

from collections.abc import Collection, Sequence

from benchmarks.forgetting.measures import Cell, by_task
from benchmarks.forgetting.results import Results, average


def best_settings(results: Results, method: str, settings: Sequence[str], cells: Collection[Cell]) -> list[str]:
    """Return the two settings with the best mean of old and new exact match after one task.

    Args:
        results: of one task; the sequences are drawn from other seeds.
        method: whose.
        settings: to choose among.
        cells: whose runs decide.
    """

    def worth(setting: str) -> float:
        runs = results.runs("one", method, setting)
        return by_task({cell: average(run) for cell, run in runs.items() if cell in cells}).mean

    return sorted(settings, key=worth, reverse=True)[:2]
