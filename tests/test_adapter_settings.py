"""Settings of an adapter: patterns match as peft's do, in bounded time, and what nothing corresponds to is noted."""

import random
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from peft_adapters import LINEAR, edit_config

from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.lora.adapter import Adapter
from fisherkit.checkpoint.lora.patterns import ModulePattern
from fisherkit.errors import CheckpointError

PIECES = ["a", "b", "1", r"\.", ".", "[ab]", "[^a.]", "[0-9]", r"\d", r"\w", "q_proj", "{", "}"]
REPEATS = ["*", "+", "?", "{2}", "{1,}", "{,2}", "{0,3}", "*?", "+?", "??", "{,}"]


def some_pattern(draw: random.Random, depth: int = 0) -> str:
    """A regular expression of nested groups, alternatives and repetitions."""
    kind = draw.random()
    if kind < 0.4 or depth > 3:
        return draw.choice(PIECES)
    inner = some_pattern(draw, depth + 1)
    if kind < 0.6:
        return inner + some_pattern(draw, depth + 1)
    if kind < 0.75:
        return f"({draw.choice(['', '?:'])}{inner}|{some_pattern(draw, depth + 1)})"
    return f"({inner}){draw.choice(REPEATS)}" if kind < 0.97 else draw.choice("^$") + inner


def expected(pattern: str, name: str) -> bool:
    """As peft does it."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def test_patterns_match_what_pefts_do() -> None:
    draw, drawn = random.Random(0), {True: 0, False: 0}  # noqa: S311
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested sets
        while sum(drawn.values()) < 4000:
            text = some_pattern(draw)
            try:
                re.compile(text)
            except re.error:
                continue
            pattern = ModulePattern(text)
            for _ in range(3):
                name = "".join(draw.choices("ab1.{}", k=draw.randrange(9)))
                wanted = expected(text, name)
                assert pattern.matches(name) == wanted, (text, name)
                drawn[wanted] += 1
    assert min(drawn.values()) > 500


@pytest.mark.parametrize(
    "text", ["q_proj", r"layers\.[12]\..*", "proj", "layers.0.self_attn.q_proj", r"^model\..*q_proj$"]
)
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj", "q_proj", ""])
def test_patterns_of_everyday_match_what_pefts_do(text: str, name: str) -> None:
    assert ModulePattern(text).matches(name) == expected(text, name)


BACKTRACKING = ["(a+)+b", "(a|a)*c", "(a|aa)+$x", "((((a*)*)*)*)*b", "(.*)*x", "(.*,){20}b", "(a{1,200}){1,200}b"]


@pytest.mark.parametrize("text", [*BACKTRACKING, "a?" * 300 + "b", "a*" * 400])
def test_patterns_that_backtrack_take_no_time(text: str) -> None:
    started = time.monotonic()
    ModulePattern(text).matches("model." + "a" * 200 + "!")
    assert time.monotonic() - started < 10  # with re: years


@pytest.mark.parametrize("text", ["(?=a)", "(?P<x>a)", r"(a)\1", "(a)*+", "a++(b)", r"(\bq)", "(?i:q)"])
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="which is not understood here"):
        ModulePattern(text)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (
            {"alpha_pattern": {"k_proj": 3, "q_proj": 8}},
            "alpha_pattern is for modules that it has no factors of: 'k_proj'",
        ),
        ({"rank_pattern": {r"layers\.9\..*": 3}}, "rank_pattern is for modules that it has no factors of"),
        ({"modules_to_save": ["score"]}, "modules_to_save names what its file does not hold: 'score'"),
        ({"target_modules": [*LINEAR, "lm_head"]}, "target_modules names what its file has no factors of: 'lm_head'"),
        ({"target_modules": LINEAR[1:]}, f"here they are applied: 'model.layers.0.self_attn.{LINEAR[0]}'"),
        ({"target_modules": rf".*\.1\..*({'|'.join(LINEAR)})"}, "peft would not apply; here they are applied: 'model"),
        ({"layers_to_transform": [0]}, "here they are applied: 'model.layers.1."),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, "here they are applied: 'model.layers.0."),
    ],
)
def test_settings_that_nothing_corresponds_to_are_noted(
    settings: dict[str, object], note: str, adapter: Path, checkpoint: Callable[[str], Path]
) -> None:
    with Adapter.open(adapter, open_index(checkpoint("llama"))) as plain:
        before = plain.notes
    edit_config(adapter, **settings)
    with Adapter.open(adapter, open_index(checkpoint("llama"))) as opened:
        (added,) = set(opened.notes) - set(before)
    assert re.search(note, added)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [*LINEAR, "no_such_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": rf"model\.layers\.\d+\..*({'|'.join(LINEAR)})"},
        {"target_modules": r"(?=.*proj).*"},  # not understood here, so nothing can be said
        {"layers_to_transform": list(range(9)), "layers_pattern": ["layers"]},
        {"layers_to_transform": []},
    ],
)
def test_settings_that_name_what_is_there_need_no_note(
    settings: dict[str, object], adapter: Path, checkpoint: Callable[[str], Path]
) -> None:
    edit_config(adapter, **settings)
    with Adapter.open(adapter, open_index(checkpoint("llama"))) as opened:
        assert not [note for note in opened.notes if "target_modules" in note]


@pytest.mark.parametrize(
    "settings", [{"target_modules": 3}, {"target_modules": ["a", 1]}, {"layers_to_transform": ["1"]},
                 {"layers_to_transform": True}, {"layers_pattern": 7}]
)  # fmt: skip
def test_settings_of_other_types_are_refused(
    settings: dict[str, object], adapter: Path, checkpoint: Callable[[str], Path]
) -> None:
    edit_config(adapter, **settings)
    with pytest.raises(CheckpointError, match=f"{next(iter(settings))} are .*fetch the adapter again"):
        Adapter.open(adapter, open_index(checkpoint("llama")))
