"""The section of benchmarks/README.md that a run on a GPU writes, between two marks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

BEGIN, END = "<!-- gpu: written by python -m benchmarks.gpu -->", "<!-- gpu: end -->"
NOT_RUN = "not run: no GPU has been at hand, so nothing is claimed."


def rows(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *body]
    return [f"| {' | '.join(line)} |" for line in lines]


def about(hardware: Mapping[str, str], date: str) -> list[str]:
    """Return a list of what it ran on."""
    return [f"Run on {date}.", "", *(f"- {name}: {value}" for name, value in hardware.items())]


def replace(page: Path, head: Sequence[str], sections: Iterable[Sequence[str]]) -> None:
    """Put a run's table where the last one is.

    Raises:
        SystemExit: the page has no place for it.
    """
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page}: has no lines {BEGIN} and {END} for the table to stand between")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    blocks = ["\n".join(lines) for lines in (head, *sections)]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(blocks) + f"\n\n{END}{after}", "utf-8")
