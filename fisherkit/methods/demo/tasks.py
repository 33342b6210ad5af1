"""Text that the demo's model is fine-tuned on: small tasks with one right answer, unlike Python's texts.

Numbers and dates in words, words in alphabetical order, introductions. Each question comes once, so that windows held
out ask nothing that was learnt. No tensors.
"""

import random
from collections.abc import Callable
from datetime import date, timedelta

from fisherkit.methods.demo.corpus import Conversation

Task = Callable[[random.Random], tuple[str, str]]


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_ONES = _listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = _listed("twenty thirty forty fifty sixty seventy eighty ninety")
_WORDS = _listed(
    "apple bread candle door engine forest garden hammer island jacket kettle lemon mirror needle orange pepper "
    "quilt river stone table umbrella village window yellow"
)
_NAMES = _listed("Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Louis Maria Nils Olga Peter")
_TRADES = _listed("baker carpenter doctor farmer gardener lawyer painter sailor tailor teacher")
_MONTHS = _listed("January February March April May June July August September October November December")
_TOWNS = _listed("Athens Bern Cairo Dublin Geneva Lima Madrid Oslo Paris Rome Tokyo Vienna")


def task_conversations(count: int, seed: int = 0) -> tuple[Conversation, ...]:
    """Return ``count`` different questions and their answers, tasks taking turns; the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    asked: dict[str, str] = {}
    while len(asked) < count:
        question, answer = _TASKS[len(asked) % len(_TASKS)](rng)
        asked.setdefault(question, answer)
    return tuple(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in asked.items()
    )


def in_words(number: int) -> str:
    """Spell a number below a million: ``4521`` is ``four thousand five hundred twenty-one``."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = _TENS[number // 10 - 2], number % 10
        return f"{tens}-{_ONES[ones]}" if ones else tens
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {in_words(number % size)}" if number % size else ""
    return f"{in_words(number // size)} {name}{rest}"


def _number(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(10 ** rng.randint(1, 6))
    return f"Write the number {number} in words.", f"{in_words(number).capitalize()}."


def _date(rng: random.Random) -> tuple[str, str]:
    day = date(1900, 1, 1) + timedelta(days=rng.randrange(50_000))
    return f"Which day is {day.isoformat()}?", f"{day.day} {_MONTHS[day.month - 1]} {day.year}."


def _order(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(_WORDS, rng.randint(3, 5))
    return f"Put these words in order: {', '.join(words)}.", f"In order: {', '.join(sorted(words))}."


def _introduction(rng: random.Random) -> tuple[str, str]:
    name, trade, town, years = rng.choice(_NAMES), rng.choice(_TRADES), rng.choice(_TOWNS), rng.randint(20, 69)
    answer = f"{name} is a {trade}, lives in {town} and is {in_words(years)} years old."
    return f"Introduce {name}: {trade}, {town}, {years}.", answer


_TASKS: tuple[Task, ...] = (_number, _date, _order, _introduction)
