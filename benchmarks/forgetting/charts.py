"""Fronts of old against new loss after one task, each method's of its settings' means, as SVG written by hand."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.forgetting import results as figures
from benchmarks.forgetting.measures import Point, front
from benchmarks.forgetting.results import Results

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT = 520, 380, 60, 56, 210
_ROW = 18  # of the legend
_COLOURS = (
    "#31688e",
    "#d81b60",
    "#1b9e77",
    "#e6820e",
    "#7b52ab",
    "#8a6d3b",
    "#3aa0c9",
    "#666a70",
    "#a3b322",
    "#c62828",
)
_STYLE = """
svg { font: 11px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; --ink: #1b1f24; --line: #d5d9de; --paper: #fff; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ed; --line: #3a4048; --paper: #16191d; } }
text { fill: var(--ink); } .paper { fill: var(--paper); } .grid { stroke: var(--line); fill: none; }
.curve { fill: none; stroke-width: 1.5; } .ours { fill: none; stroke-width: 3; }
.plain { stroke: var(--ink); stroke-width: 2; fill: none; }
"""


@dataclass(frozen=True)
class Scale:
    """Percent to pixels; both axes begin where the data do."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, new_score: float, general_score: float) -> tuple[float, float]:
        """Return the position of a point."""
        across = (new_score - self.x[0]) / (self.x[1] - self.x[0])
        up = (general_score - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + _WIDTH * across, _TOP + _HEIGHT * (1 - up)


def curves(title: str, results: Results, methods: Sequence[str]) -> str:
    """A line per method through its settings, from the untuned model on; means over all runs.

    Colours come back as rings, and then as squares.
    """
    plain = _points(results, "plain")
    lines = {method: _points(results, method) for method in methods if method != "plain"}
    every = [point for points in (plain, *lines.values()) for point in points]
    scale = Scale(_ends([x for x, _ in every]), _ends([y for _, y in every]))
    body = _axes(scale) + _line(plain, scale, "plain", "var(--ink)", "plain (learning rates)", 0)
    for number, (method, points) in enumerate(lines.items()):
        css = "ours" if method == "shield" else "curve"
        turn, colour = divmod(number, len(_COLOURS))
        body += _line(points, scale, css, _COLOURS[colour], method, number + 1, turn)
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + max(_HEIGHT + 50, 10 + _ROW * (len(lines) + 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{_STYLE}</style><rect class="paper" width="100%" height="100%"/>'
        f"{_text(_LEFT, 22, title)}{body}</svg>\n"
    )


def _points(results: Results, method: str) -> list[Point]:
    arms = [("base", "-"), *((method, setting) for setting in results.of_curve("one", method))]
    reads = (figures.new, figures.old)
    return front(
        (100 * new, 100 * old)
        for new, old in ([results.mean("one", *arm, read).mean for read in reads] for arm in arms)
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Full tens around the values."""
    low, high = 10 * (min(values) // 10), 10 * -(-max(values) // 10)
    return low, max(high, low + 10)


def _axes(scale: Scale) -> str:
    body = ""
    for y in _ticks(scale.y):
        left, top = scale.at(scale.x[0], y)
        body += f'<path class="grid" d="M{left:.1f} {top:.1f}h{_WIDTH}"/>' + _text(left - 8, top + 4, f"{y:.0f}", "end")
    for x in _ticks(scale.x):
        across, bottom = scale.at(x, scale.y[0])
        body += f'<path class="grid" d="M{across:.1f} {bottom:.1f}v{-_HEIGHT}"/>'
        body += _text(across, bottom + 16, f"{x:.0f}", "middle")
    body += _text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 36, "new task, exact match, %", "middle")
    return body + _text(_LEFT - 44, _TOP - 12, "old tasks, %")


def _ticks(ends: tuple[float, float]) -> Sequence[int]:
    """Full tens, or twenties where these are many."""
    low, high = round(ends[0]), round(ends[1])
    return range(low, high + 1, 10 if high - low <= 60 else 20)


def _line(
    points: Sequence[tuple[float, float]],
    scale: Scale,
    css: str,
    colour: str,
    name: str,
    row: int,
    turn: int = 0,
) -> str:
    placed = [scale.at(*point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    body = f'<polyline class="{css}" stroke="{colour}" points="{path}"/>'
    for (x, y), (new_score, old) in zip(placed, points, strict=True):
        body += _mark(x, y, colour, turn, f"{name}: new {new_score:.1f}, old {old:.1f}")
    left, top = _LEFT + _WIDTH + 18, _TOP + 10 + _ROW * row
    return body + _mark(left, top, colour, turn, name) + _text(left + 10, top + 4, name)


def _mark(x: float, y: float, colour: str, turn: int, tooltip: str) -> str:
    """Return a disc; a ring and then a square for colours that come back."""
    title = f"<title>{html.escape(tooltip)}</title>"
    if turn > 1:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{colour}">{title}</rect>'
    fill = f'fill="var(--paper)" stroke="{colour}" stroke-width="2"' if turn else f'fill="{colour}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" {fill}>{title}</circle>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
