"""Places of labels beside points, so that they cover neither each other nor other points. Lengths are in pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

from fisherkit.render.svg import LETTER

_HEIGHT = 13.0
_SIDES = ((1, -1), (-1, 1), (1, 0), (-1, 0), (0, -1), (0, 1), (1, 1), (-1, -1))
"""Directions in which a label may lie, the best first: off the bars of a point, and off a line that falls to it."""
_DOT = 6.0
_STROKE = 1.5

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Label:
    """A label with its box.

    Attributes:
        words: what it says.
        left: of the box.
        top: of the box.
        width: of the box.
    """

    words: str
    left: float
    top: float
    width: float

    @property
    def baseline(self) -> float:
        """Height of the base line of its letters."""
        return self.top + 0.78 * _HEIGHT


def place_labels(
    points: Sequence[tuple[float, float]], words: Sequence[str], strokes: Sequence[Box], right: float, bottom: float
) -> list[Label]:
    """Put a label beside each point, where it covers least; first come, first served.

    Args:
        points: (x, y), y downwards.
        words: of each label.
        strokes: lines to keep clear of, to the right or down.
        right: what lies beyond is outside of the drawing, as is everything below 0.
        bottom: the same, downwards.
    """
    taken = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in points]
    taken += [(a - _STROKE, b - _STROKE, c + _STROKE, d + _STROKE) for a, b, c, d in strokes]
    placed: list[Label] = []
    for (x, y), text in zip(points, words, strict=True):
        width = LETTER * len(text) + 2
        choices = [_beside(x, y, side, text, width) for side in _SIDES]
        boxes = [*taken, *map(_box, placed)]
        placed.append(min(choices, key=lambda one: _covered(_box(one), boxes, right, bottom)))
    return placed


def _beside(x: float, y: float, side: tuple[int, int], words: str, width: float) -> Label:
    across, down = side
    gap = 0 if down and across else 2
    left = x + across * (_DOT + gap) - (0 if across > 0 else width if across < 0 else width / 2)
    top = y + down * (_DOT + _HEIGHT / 2 + gap - 1) - _HEIGHT / 2
    return Label(words, left, top, width)


def _box(label: Label) -> Box:
    return label.left, label.top, label.left + label.width, label.top + _HEIGHT


def _covered(box: Box, others: Sequence[Box], right: float, bottom: float) -> float:
    """Area that a box shares with others; what lies outside of the drawing counts tenfold."""
    left, top, end, foot = box
    inside = max(0.0, min(end, right) - max(left, 0.0)) * max(0.0, min(foot, bottom) - max(top, 0.0))
    shared = sum(max(0.0, min(end, c) - max(left, a)) * max(0.0, min(foot, d) - max(top, b)) for a, b, c, d in others)
    return shared + 10 * ((end - left) * (foot - top) - inside)
