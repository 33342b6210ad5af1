"""Runs that are killed on the way, by a progress function that raises what nothing catches."""

from collections.abc import Callable

Track = Callable[[str, int, int], None]


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


def killed_after(steps: int, stage: str | None = None) -> Track:
    """A progress function that kills the run after so many of its steps, or of those of one stage."""
    left = [steps]

    def track(at: str, done: int, total: int) -> None:
        left[0] -= stage in (None, at)
        if left[0] < 0:
            raise Killed

    return track
