"""Everything that fisherkit raises on purpose.

    FisherkitError                one line: what is wrong, where, what to do
    ├── OptionError               an option outside its range (also a ValueError); exit code 2
    ├── CheckpointError           a model, Fisher or mask file that cannot be trusted or read
    ├── PromptError               a prompt set that cannot be read, or that has nothing to learn from
    ├── UnsupportedModelError     an architecture or a quantisation that extract cannot do
    ├── TrainingError             a model, an optimizer or a mask that a training run cannot be held to
    ├── OutputError               a target that exists, cannot be written, or a disk that is full
    ├── ResumeError               a work folder that belongs to another run
    └── MissingLibraryError       an optional library that is not installed

Only ``fisherkit.cli.console`` catches the root of this tree; it prints the message and exits with 1 (or 2).
"""

from collections.abc import Sequence


class FisherkitError(Exception):
    """Root of the tree. The message is meant for the person at the terminal and fits one line."""

    exit_code = 1


class OptionError(FisherkitError, ValueError):
    """An option's value is outside its range, or two options contradict each other."""

    exit_code = 2


class CheckpointError(FisherkitError):
    """A tensor file or folder is missing, truncated, inconsistent, or holds values that are not finite."""


class PromptError(FisherkitError):
    """A prompt set is empty, unreadable, lacks the field, or has no loss token.

    The message may quote paths, columns and templates of any length: its middle is left out above 300 characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 300 else f"{message[:180]} ... {message[-115:]}")


class UnsupportedModelError(FisherkitError):
    """A model that is not a causal language model that can be measured as it is."""


class TrainingError(FisherkitError):
    """This run cannot be made to obey this mask: how it is wrapped, what it trains, or what keeps its weights."""


class OutputError(FisherkitError):
    """A target that exists already, cannot be written, or lies on a full disk."""


class ResumeError(FisherkitError):
    """A work folder that does not belong to this model, these prompts and these options."""


class MissingLibraryError(FisherkitError):
    """An optional library is needed for what was asked."""

    def __init__(self, library: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the library {library!r}: pip install {library}")


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def some_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of many and how many more there are, for a message: ``a, b, c and 4 more``."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s: ``1 group``, ``2 groups``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
