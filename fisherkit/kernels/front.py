"""The Pareto front of a few points: those that no other one beats. Standard library only."""

import math
from collections.abc import Sequence


def front(points: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Return the places of the points that no other beats, ordered by their first coordinate.

    One point beats another if it is nowhere higher and somewhere lower. Of equal points all are on the front, or none.

    Args:
        points: coordinates, lower being better; a point with NaN is on no front and beats none.
    """
    known = [at for at, point in enumerate(points) if not any(map(math.isnan, point))]
    best = [at for at in known if not any(_beats(points[other], points[at]) for other in known)]
    return tuple(sorted(best, key=lambda at: tuple(points[at])))


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
