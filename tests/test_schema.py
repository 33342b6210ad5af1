"""The validator of JSON files: what a rule lets pass, and the one line that says where a value breaks it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fisherkit.artefacts import covariance_file, fisher_sidecar, mask_entry, sparse_delta
from fisherkit.artefacts.layer_importance import parse_rows, read_importance
from fisherkit.checkpoint.schema import (
    MisfitError,
    Rule,
    flag,
    listed,
    maybe,
    named,
    number,
    read_beside,
    read_object,
    shape,
    table,
    text,
    whole,
)
from fisherkit.errors import CheckpointError


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (text(), ["", "x"], [1, None, []]),
        (text("a", "b"), ["a"], ["c", ""]),
        (flag, [True, False], [0, 1, "true", None]),
        (whole(), [0, 2**63 - 1], [-1, 2**63, 1.0, True, "1", 10**400]),
        (whole(1, 3), [1, 3], [0, 4]),
        (number(), [0, -1.5, 10**300], [math.nan, math.inf, "1", True, 10**400, None]),
        (number(0, 1), [0, 1], [-1e-9, 1.1]),
        (shape, [[], [0], [2, 3], [1] * 64], [[2**62, 0], [2**30, 2**30], [-1], [1.0], [1] * 65, "12", 3, None]),
        (maybe(whole()), [None, 1], ["1"]),
        (listed(whole(), 1), [[1]], [[], [1, "2"], {}, "1"]),
        (named(whole()), [{}, {"a": 1}], [{"a": "1"}, [], None]),
        (
            table({"a": whole()}, {"b": text()}),
            [{"a": 1}, {"a": 1, "b": "", "c": 9}],
            [{}, {"a": ""}, {"a": 1, "b": 1}],
        ),
    ],
)
def test_a_rule_lets_pass_what_it_names_and_nothing_else(rule: Rule, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        rule(value, "x")
    for value in bad:
        with pytest.raises(MisfitError, match=r"^x|^it") as caught:
            rule(value, "x")
        assert len(str(caught.value)) < 300


def test_a_misfit_says_where_it_lies() -> None:
    rule = table({"rows": named(table({"sizes": listed(whole())}))})
    with pytest.raises(MisfitError, match=r"^rows\.w\.sizes\[1\] is 'x', not a whole number"):
        rule({"rows": {"w": {"sizes": [1, "x"]}}}, "")


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff"]
)
def test_what_is_no_object_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"x\.json: ") as caught:
        read_object(path, "a mask", table({}), "make it anew")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_json_that_may_be_anybodys_is_taken_for_ours_only_if_it_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read_beside(path) is None
    path.write_text("[1]")
    assert read_beside(path) is None
    path.write_text('{"a": 1}')
    assert read_beside(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_beside(path)


FORMATS: dict[str, tuple[Rule, dict[str, Any]]] = {
    "fisher": (
        fisher_sidecar.SCHEMA,
        {
            "format": "fisherkit.fisher/1",
            "tensors": {"w": {"shape": [2, 3], "sum": 1.0, "max": 1.0, "zeros": 0, "nonfinite": 0}},
            "histogram": [[5, 6, 1.0]],
        },
    ),
    "mask": (
        mask_entry.SCHEMAS["mask"],
        {
            "format": "fisherkit.mask/1",
            "file": "m.safetensors",
            "kind": "mask",
            "tensors": {"w": {"shape": [2, 3], "over": 1, "packed": False, "kept": 3}},
        },
    ),
    "subspace": (
        mask_entry.SCHEMAS["subspace"],
        {
            "format": "fisherkit.mask/1",
            "file": "m.safetensors",
            "kind": "subspace",
            "tensors": {"w": {"shape": [2, 3], "rank": 1, "energy": 0.5, "effective_rank": 1.0}},
        },
    ),
    "activations": (
        covariance_file.SCHEMA,
        {
            "format": "fisherkit.activations/1",
            "file": "a.safetensors",
            "moments": {"w.input": {"side": "input", "tensors": ["w"], "size": 3, "sketch_rank": None, "trace": 1.0}},
        },
    ),
    "delta": (
        sparse_delta.SCHEMA,
        {"format": "fisherkit.delta/1", "file": "d.safetensors", "base_fingerprint": "00"},
    ),
}


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the whole excepted."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in parts for place in ((*path, key), *places(value, (*path, key)))]


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_of_a_format_is_held_to_a_rule(name: str) -> None:
    rule, content = FORMATS[name]
    rule(content, "")
    for place in places(content):
        with pytest.raises(MisfitError):
            rule(changed(content, place, {"of": object}), "")


@pytest.mark.parametrize(
    "content",
    [
        {"layers": [{"layer": 2**70, "mean": 1.0}]},
        {"layers": [{"layer": 0, "mean": "1"}]},
        {"layers": [{"layer": 0, "mean": -1.0}]},
        {"layers": [{"mean": 1.0}]},
        {"layers": [{"layer": 0, "mean": 10**400}]},
        {"layers": [{"layer": 0}]},
        {"0": 10**400},
        {"0": [1]},
        {"a": 1.0},
        [[1.0]],
        [None],
        [],
        {},
        "12",
        7,
    ],
)
def test_no_other_layer_importance_passes(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "layer_importance.json"
    path.write_text(json.dumps(content))
    for source in (path, content) if not isinstance(content, str) else (path,):
        with pytest.raises(CheckpointError, match="layer importance"):
            read_importance(source)


def test_all_forms_of_a_layer_importance_say_the_same() -> None:
    full = {"layers": [{"layer": 0, "name": "0", "weights": 0, "sum": 1.0, "mean": 1.0}]}
    assert parse_rows(full, "x") == parse_rows({"0": 1}, "x") == parse_rows({0: 1.0}, "x") == parse_rows([1], "x")
