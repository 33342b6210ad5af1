"""Questions with one right answer, made up from a seed: what the base learns, and what is new.

A question is in the test split or not by its own text, so that no split can share an item with the other. The
base's tasks and the new ones ask in other words and want other answers. No tensors.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

Item = tuple[str, str]
"""Question and answer."""
Split = Literal["train", "test"]
Task = Callable[[random.Random], Item]

_LETTERS = "abcdefghij"
_VOWELS = "aei"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNITS = (("km", "m", 3), ("m", "cm", 2), ("cm", "mm", 1), ("kg", "g", 3), ("l", "dl", 1), ("t", "kg", 3))
_TEST_SHARE = 5
"""One question in so many is for testing."""


def items(task: Task, split: Split, count: int, seed: str) -> list[Item]:
    """``count`` items of one split, the same ones for the same seed; an item may come twice, in its own split only."""
    rng = random.Random(seed)
    found: list[Item] = []
    while len(found) < count:
        item = task(rng)
        if is_test(item[0]) == (split == "test"):
            found.append(item)
    return found


def is_test(question: str) -> bool:
    """Return whether a question belongs to the test split, by a hash of its text."""
    return zlib.crc32(question.encode()) % _TEST_SHARE == 0


# What the base learns: of graded difficulty, so that most tasks are neither perfect in the base nor beyond it.


def _word(rng: random.Random, least: int = 3, most: int = 4) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(least, most)))


def _copy(rng: random.Random) -> Item:
    word = _word(rng, 8, 16)
    return f"copy {word}", word


def _reverse(rng: random.Random) -> Item:
    word = _word(rng, 6, 12)
    return f"reverse {word}", word[::-1]


def _sort(rng: random.Random) -> Item:
    word = "".join(rng.sample(_LETTERS, rng.randint(4, 8)))
    return f"sort {word}", "".join(sorted(word))


def _count(rng: random.Random) -> Item:
    wanted = rng.choice("xyz")
    word = "".join(rng.choice("xyz") for _ in range(rng.randint(2, 4)))
    return f"count {wanted} in {word}", str(word.count(wanted))


def _lookup(rng: random.Random) -> Item:
    keys = rng.sample(_LETTERS, 2)
    values = [str(rng.randrange(10)) for _ in keys]
    wanted = rng.randrange(len(keys))
    table = " ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return f"{table} what is {keys[wanted]}", values[wanted]


def _larger(rng: random.Random) -> Item:
    a, b = rng.sample(range(10, 100), 2)
    return f"larger of {a} {b}", str(max(a, b))


def _vowels(rng: random.Random) -> Item:
    word = _word(rng, 8, 13)
    return f"vowels as star in {word}", "".join("*" if letter in _VOWELS else letter for letter in word)


def _middle(rng: random.Random) -> Item:
    word = _word(rng, 3, 12)
    return f"middle of {word}", word[len(word) // 2]


def _last(rng: random.Random) -> Item:
    word = _word(rng, 4, 11)
    return f"last three of {word}", word[-3:]


def _double(rng: random.Random) -> Item:
    word = _word(rng, 4, 9)
    return f"double {word}", "".join(2 * letter for letter in word)


def _upper(rng: random.Random) -> Item:
    word = _word(rng, 8, 13)
    return f"upper {word}", word.upper()


def _rotate(rng: random.Random) -> Item:
    word = _word(rng, 6, 13)
    return f"rotate {word}", word[1:] + word[0]


def _join(rng: random.Random) -> Item:
    word = _word(rng, 6, 10)
    return f"join {' '.join(word)}", word


def _next(rng: random.Random) -> Item:
    word = _word(rng, 5, 11)
    return f"after {word}", "".join(_LETTERS[(_LETTERS.index(letter) + 1) % len(_LETTERS)] for letter in word)


PROBED: Mapping[str, Task] = {
    "copy": _copy,
    "sort": _sort,
    "count": _count,
    "upper": _upper,
    "rotate": _rotate,
    "middle": _middle,
    "larger": _larger,
}
"""Old tasks of which a method that looks at old data is shown some."""
UNSEEN: Mapping[str, Task] = {
    "reverse": _reverse,
    "next": _next,
    "lookup": _lookup,
    "vowels": _vowels,
    "join": _join,
    "last": _last,
    "double": _double,
}
"""Old tasks that no method is shown."""
BASE: Mapping[str, Task] = {**PROBED, **UNSEEN}
_SHARES: Mapping[str, int] = {
    **{"copy": 3, "sort": 5, "count": 8, "upper": 2, "rotate": 7, "middle": 3, "larger": 8},
    **{"reverse": 8, "next": 3, "lookup": 12, "vowels": 2, "join": 3, "last": 2, "double": 3},
}
"""Of each in what the base learns: what is rare there is known half."""


def base_items(count: int, seed: str) -> list[Item]:
    """Return about ``count`` training items of the old tasks, each in its share."""
    whole = sum(_SHARES.values())
    return [
        item
        for name, task in BASE.items()
        for item in items(task, "train", -(-count * _SHARES[name] // whole), f"{seed} {name}")
    ]


# What is new: short, because a small model has a few hundred items to learn each from. A cipher and an order are made
# up anew for each seed.


def _cipher(seed: int) -> Task:
    shuffled = list(_LETTERS)
    random.Random(f"cipher {seed}").shuffle(shuffled)
    key = str.maketrans(_LETTERS, "".join(shuffled))

    def task(rng: random.Random) -> Item:
        word = _word(rng, 3, 3)
        return f"cipher {word}", word.translate(key)

    return task


def _order(seed: int) -> Task:
    orders = [(1, 3, 0, 2), (2, 0, 3, 1), (2, 3, 0, 1), (1, 0, 3, 2), (3, 0, 1, 2), (1, 2, 3, 0)]
    order = random.Random(f"order {seed}").choice(orders)

    def task(rng: random.Random) -> Item:
        words = [rng.choice(_LETTERS) for _ in order]
        return f"say {' '.join(words)} oddly", " ".join(words[at] for at in order)

    return task


def _table(seed: int) -> Task:
    def task(rng: random.Random) -> Item:
        fields = [("name", _word(rng, 3, 3)), ("age", str(rng.randint(10, 99)))]
        sentence = f"{fields[0][1]} is {fields[1][1]}"
        rng.shuffle(fields)
        return ", ".join(f"{key}:{value}" for key, value in fields), sentence

    return task


def _date(seed: int) -> Task:
    def task(rng: random.Random) -> Item:
        decade, year, month, day = rng.randrange(10), rng.randrange(9), rng.randrange(12), rng.randint(1, 28)
        return f"year after {decade}{year}-{month + 1:02}-{day:02}", f"{day:02} {_MONTHS[month]} {decade}{year + 1}"

    return task


def _stack(seed: int) -> Task:
    def task(rng: random.Random) -> Item:
        stack = [rng.choice(_LETTERS) for _ in range(3)]
        asked, operation = "".join(stack), rng.choice(("dup", "drop", "swap"))
        _operate(stack, operation)
        return f"{asked} {operation}", "".join(stack)

    return task


def _operate(stack: list[str], operation: str) -> None:
    if operation == "dup":
        stack.append(stack[-1])
    elif operation == "drop":
        stack.pop()
    else:
        stack[-2:] = stack[:-3:-1]


def _unit(seed: int) -> Task:
    def task(rng: random.Random) -> Item:
        large, small, zeros = rng.choice(_UNITS)
        number = rng.randint(1, 99)
        return f"{number} {large} in {small}", f"{number}{'0' * zeros} {small}"

    return task


NEW: Mapping[str, Callable[[int], Task]] = {
    "cipher": _cipher,
    "order": _order,
    "date": _date,
    "stack": _stack,
    "unit": _unit,
    "table": _table,
}


def new_task(name: str, seed: int) -> Task:
    """A new task; of another seed it may be another one."""
    return NEW[name](seed)


def takes_turns(tasks: Mapping[str, Task], split: Split, count: int, seed: str) -> Iterator[Item]:
    """Items of several tasks, mixed."""
    made = {name: iter(items(task, split, -(-count // len(tasks)), f"{seed} {name}")) for name, task in tasks.items()}
    for at in range(count):
        yield next(made[list(tasks)[at % len(tasks)]])
