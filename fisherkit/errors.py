"""Everything that fisherkit raises on purpose.

    FisherkitError                one line: what is wrong, where, what to do
    ├── OptionError               an option outside its range (also a ValueError); exit code 2
    ├── CheckpointError           a model, Fisher or mask file that cannot be trusted or read
    ├── PromptError               a prompt set that cannot be read, or that has nothing to learn from
    ├── UnsupportedModelError     an architecture or a quantisation that extract cannot do
    ├── TrainingError             a model, an optimizer or a mask that a training run cannot be held to
    ├── OutputError               a target that exists, cannot be written, or a disk that is full
    ├── ResumeError               a work folder that belongs to another run
    ├── RankFailedError           another process of the same run has failed
    └── MissingLibraryError       an optional library that is not installed

Only ``fisherkit.cli.console`` catches the root of this tree; it prints the message and exits with 1 (or 2).
"""

import re
from collections.abc import Sequence

LINE_CHARACTERS = 290
"""Longest line of an error, besides the word Error."""


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

    The message may quote paths, columns and templates of any length, and is made to fit; see fit_line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(fit_line(message))


class UnsupportedModelError(FisherkitError):
    """A model that is not a causal language model that can be measured as it is."""


class TrainingError(FisherkitError):
    """This run cannot be made to obey this mask: how it is wrapped, what it trains, or what keeps its weights."""


class OutputError(FisherkitError):
    """A target that exists already, cannot be written, or lies on a full disk."""


class ResumeError(FisherkitError):
    """A work folder that does not belong to this model, these prompts and these options."""


class RankFailedError(FisherkitError):
    """Another of the processes that share a run has failed, so that this one cannot go on."""


class MissingLibraryError(FisherkitError):
    """An optional library is needed for what was asked."""

    def __init__(self, library: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the library {library!r}: pip install {library}")


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def fit_line(text: str, most: int = LINE_CHARACTERS) -> str:
    """Return a text of at most ``most`` characters that still names what is wrong.

    Paths lose their folders first, the longest path before the others. What is still too long loses its middle.

    Args:
        text: one line.
        most: characters, 110 or more.
    """
    words = {word for word in re.findall(r"[^\s'\"]+", text) if "/" in word}
    for path in sorted(words, key=len, reverse=True):
        if len(text) <= most:
            break
        text = text.replace(path, _last_of(path))
    return text if len(text) <= most else f"{text[: most - 105]} ... {text[-100:]}"


def _last_of(path: str) -> str:
    """Return the file and the folder around it, of which only the ends where they are long."""
    end = "/".join(path.split("/")[-2:])
    short = f".../{end}" if len(end) <= 60 else f"...{end[-60:]}"
    return min(short, path, key=len)


def some_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of many and how many more there are, for a message: ``a, b, c and 4 more``."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s: ``1 group``, ``2 groups``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
