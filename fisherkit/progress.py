"""Two callables that are handed down, so that no floor below the terminal knows how progress is shown."""

from collections.abc import Callable

Track = Callable[[str, int, int], None]
"""Progress: called with the stage's name, how much of it is done, and how much there is in all.

A stage may tell more after a colon, ``measuring: backward, group 2 of 8``; what stands before it names the stage.
"""

Say = Callable[[str], None]
"""Remarks for a person: called with one line."""
