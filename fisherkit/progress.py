"""The two callables that are handed down, so that no floor below the terminal knows how progress is shown."""

from collections.abc import Callable

Track = Callable[[str, int, int], None]
"""Progress: called with the stage's name, how much of it is done, and how much there is in all."""

Say = Callable[[str], None]
"""Remarks for a person: called with one line."""
