r"""Patterns of module names in an adapter's configuration, matched as peft does, in bounded time.

peft matches ``(.*\.)?(PATTERN)$`` with Python's ``re``, which backtracks: on a pattern such as ``(a+)+b`` its time is
exponential in the length of the name. Here only the simplest patterns go to ``re``. For all others the places where a
part of the pattern may end are worked out once for each place where it may begin, in time polynomial in both lengths.
Understood are characters, classes, ``.``, groups, ``|``, ``^``, ``$`` and repetitions.
"""

import functools
import operator
import re
import warnings
from collections.abc import Callable
from functools import cached_property

MAX_LENGTH = 1000
"""Characters of a pattern."""
_MAX_DEPTH = 50  # groups inside of each other
_MAX_LEAST = 32  # times that something must be repeated at least
_SPECIAL = frozenset("*+?{(|")
_CHEAP = 2  # repetitions that backtracking cannot make much of
_REPEAT = re.compile(r"(?:([*+?])|\{(?!\})(\d*)(,?)(\d*)\})\??")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]")

Part = Callable[[int], int]
"""A part of a pattern on one name: from the place where it begins to those where it may end, as bits of a number."""


class ModulePattern:
    """A regular expression for the end of a module's name, from a dot on.

    Args:
        text: the expression.

    Raises:
        ValueError: it is none, or holds what is not understood here; the message says which.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"has more than {MAX_LENGTH} characters")
        try:
            _compiled(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        self.text = text
        if not self._is_simple:
            _Parser(text, "").whole()  # so that what is not understood is refused before a name is matched

    @cached_property
    def _is_simple(self) -> bool:
        special = [character for character in self.text if character in _SPECIAL]
        return len(special) <= _CHEAP and not {"(", "|"} & set(special)

    def matches(self, name: str) -> bool:
        """Return whether a module's name ends so."""
        if self._is_simple:
            return _compiled(rf"(.*\.)?({self.text})$").match(name) is not None
        part = _Parser(self.text, name).whole()
        begins = (0, *(at + 1 for at, character in enumerate(name) if character == "."))
        return any(part(begin) >> len(name) & 1 for begin in begins)


def _compiled(text: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a later Python may read otherwise
        return re.compile(text)


class _Parser:
    """Turns a pattern into a Part on one name. The pattern is known to be one of ``re``'s."""

    def __init__(self, pattern: str, name: str) -> None:
        self._pattern, self._name = pattern, name
        self._at = self._depth = 0

    def whole(self) -> Part:
        part = self._alternatives()
        if self._at < len(self._pattern):
            raise self._unknown()
        return part

    def _alternatives(self) -> Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _either(parts)

    def _sequence(self) -> Part:
        parts: list[Part] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            part = self._atom()
            if repeat := _REPEAT.match(self._pattern, self._at):
                self._at = repeat.end()
                if self._pattern.startswith("+", self._at):
                    raise self._unknown()  # a possessive repetition, which does not give back what it took
                part = self._repeated(part, repeat)
            parts.append(part)
        return _in_turn(parts)

    def _atom(self) -> Part:
        if self._take("("):
            return self._group()
        if self._take("^"):
            return lambda begin: int(begin == 0)
        if self._take("$"):
            return lambda begin: int(begin == len(self._name)) << begin
        return self._character()

    def _group(self) -> Part:
        if self._pattern[self._at] == "?" and not self._take("?:"):
            raise self._unknown()
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"has more than {_MAX_DEPTH} groups inside of each other")
        part = self._alternatives()
        self._depth -= 1
        if not self._take(")"):
            raise self._unknown()
        return part

    def _character(self) -> Part:
        """One character, a class of them or any: ``re`` says which belong to it."""
        found = _CLASS.match(self._pattern, self._at)
        if found:
            text = found[0]
        elif self._pattern[self._at] == "\\":
            text = self._pattern[self._at : self._at + 2]
            if text[1:].isalnum() and text[1:] not in "dDsSwW":
                raise self._unknown()
        else:
            text = self._pattern[self._at]
        self._at += len(text)
        one, name = _compiled(text if len(text) > 1 or text == "." else re.escape(text)), self._name
        ends = [int(one.fullmatch(character) is not None) << at for at, character in enumerate(name, start=1)]
        return lambda begin: ends[begin] if begin < len(name) else 0

    def _repeated(self, part: Part, repeat: re.Match[str]) -> Part:
        """At least and at most so often; more often than the name is long nothing new is reached."""
        most = len(self._name) + 1
        if repeat[1]:
            low, high = {"*": (0, most), "+": (1, most), "?": (0, 1)}[repeat[1]]
        else:
            low = int(repeat[2] or 0)
            high = int(repeat[4]) if repeat[4] else most if repeat[3] else low
        if low > _MAX_LEAST:
            raise ValueError(f"repeats something at least {low} times, which is not understood here")
        if high < most:
            return _memory(lambda begin: _repeat(part, begin, low, high))
        star = _star(part, len(self._name))
        return _memory(lambda begin: _from_all(star, _repeat(part, begin, low, low)))

    def _take(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _unknown(self) -> ValueError:
        return ValueError(f"holds {self._pattern[self._at : self._at + 4]!r}, which is not understood here")


def _memory(part: Part) -> Part:
    """Make a part remember the ends of every begin."""
    known: dict[int, int] = {}

    def remembered(begin: int) -> int:
        if begin not in known:
            known[begin] = part(begin)
        return known[begin]

    return remembered


def _from_all(part: Part, begins: int) -> int:
    """Places where a part may end that begins at one of several."""
    ends = 0
    while begins:
        lowest = begins & -begins
        ends |= part(lowest.bit_length() - 1)
        begins ^= lowest
    return ends


def _either(parts: list[Part]) -> Part:
    return _memory(lambda begin: functools.reduce(operator.or_, (part(begin) for part in parts)))


def _in_turn(parts: list[Part]) -> Part:
    return _memory(lambda begin: functools.reduce(lambda ends, part: _from_all(part, ends), parts, 1 << begin))


def _star(part: Part, length: int) -> Part:
    """Any number of repetitions: what is reached from a place is what is reached from where one repetition leads."""
    table: list[int] = []

    def ends(begin: int) -> int:
        if not table:
            table.extend(1 << at for at in range(length + 1))
            for at in range(length, -1, -1):  # from the end, where everything ahead is known
                table[at] |= _from_all(table.__getitem__, part(at) & ~(1 << at))
        return table[begin]

    return ends


def _repeat(part: Part, begin: int, low: int, high: int) -> int:
    reached = 1 << begin
    for _ in range(low):
        reached = _from_all(part, reached)
    found = fresh = reached
    for _ in range(high - low):  # a place that was reached by fewer repetitions need not be left again
        fresh = _from_all(part, fresh) & ~found
        if not fresh:
            break
        found |= fresh
    return found
