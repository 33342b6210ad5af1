"""Fronts and advice: what a sweep is judged by."""

import itertools
import math
import re

import numpy as np
import pytest
import score_reports

from fisherkit.errors import OptionError
from fisherkit.kernels.front import front
from fisherkit.methods.score.advice import advise, check_budgets, front_of
from fisherkit.options.budget import Budget, parse_budget

SETS = ("old", "new")
LOSSES = {
    "BASE": (2.00, 3.00),
    "FT": (2.50, 1.00),
    "fapm 0.1": (2.40, 1.05),
    "fapm 0.5": (2.10, 1.40),
    "fapm 0.9": (2.01, 2.20),
    "random 0.5": (2.15, 1.60),
    "random 0.9": (2.02, 2.70),
}
POINTS = [name for name in LOSSES if name.startswith("fapm")]
CONTROLS = [name for name in LOSSES if name.startswith("random")]


def test_the_front_is_what_no_other_point_beats() -> None:
    random = np.random.default_rng(0)
    for size, axes in itertools.product((0, 1, 2, 7, 30), (1, 2, 3)):
        points = random.integers(0, 6, (size, axes)).astype(float)
        found = front(points.tolist())
        for at in range(size):
            beaten = any((points[o] <= points[at]).all() and (points[o] < points[at]).any() for o in range(size))
            assert (at in found) != beaten
        assert [tuple(points[at]) for at in found] == sorted(tuple(points[at]) for at in found)


def test_equal_points_are_on_the_front_together_and_nan_on_none() -> None:
    assert front([(1, 2), (1, 2), (2, 3)]) == (0, 1)
    assert front([(math.nan, 0), (1, 1)]) == (1,)
    assert front([(math.nan, 0)]) == ()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("old:+0.02", Budget("old", 0.02)),
        ("old:0.02", Budget("old", 0.02)),
        ("old:+0", Budget("old", 0.0)),
        ("old:-0", Budget("old", 0.0)),
        ("a:b:1e-3", Budget("a:b", 0.001)),
        ("old:-1%", Budget("old", -0.01, is_exact=True)),
        ("old:-0.5 %", Budget("old", -0.005, is_exact=True)),
        ("old:-0%", Budget("old", 0.0, is_exact=True)),
    ],
)
def test_budgets_are_read_as_they_are_meant(text: str, wanted: Budget) -> None:
    assert parse_budget(text) == wanted
    assert parse_budget(str(wanted)) == wanted


@pytest.mark.parametrize(
    "text", ["", "old", "old:", ":1", "old:x", "old:1%%", "old:nan", "old:inf", "old:--1", "old:1%"]
)
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--budget"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("old:-5", r"say \+5 for nats that the loss may rise by, or -5% for exact matches that may go"),
        ("old:-.02", r"say \+\.02 for nats .*, or -\.02% for"),
        ("old:+1%", r"say -1% for exact matches that may go, or \+1 without %"),
    ],
)
def test_a_gain_is_no_budget(text: str, advice: str) -> None:
    with pytest.raises(OptionError, match=f"--budget '{re.escape(text)}': .*{advice}"):
        parse_budget(text)


def test_the_best_point_within_the_budget_is_advised() -> None:
    report = score_reports.sweep(losses=LOSSES)
    wanted = {0.005: None, 0.01: "fapm 0.9", 0.09: "fapm 0.9", 0.1: "fapm 0.5", 0.39: "fapm 0.5", 0.4: "fapm 0.1"}
    for most, name in wanted.items():
        found = advise(report, [Budget("old", most)], POINTS, CONTROLS, "FT")
        assert found.chosen == name, most
        assert (name or "no point stays within") in found.line
        assert f"old:+{most:g}" in found.line


def test_the_front_of_a_report_is_over_all_of_its_sets() -> None:
    found = front_of(score_reports.sweep(losses=LOSSES))
    assert found == ["BASE", "fapm 0.9", "fapm 0.5", "fapm 0.1", "FT"]
    three = score_reports.report(
        {
            "a": {"old": (2.0, 0), "code": (1.0, 0), "new": (3.0, 0)},
            "b": {"old": (2.1, 0), "code": (1.1, 0), "new": (3.0, 0)},
            "c": {"old": (2.1, 0), "code": (0.9, 0), "new": (3.1, 0)},
        }
    )
    assert front_of(three) == ["a", "c"]


def test_the_figures_of_the_advice_are_those_of_the_report() -> None:
    found = advise(score_reports.sweep(losses=LOSSES), [Budget("old", 0.1)], POINTS, CONTROLS, "FT")
    assert found.line == "fapm 0.5: new 1.4 nats per token (from 3); old +0.1000 ± 0.01, within old:+0.1"


def test_exact_matches_are_weighed_where_the_budget_is_in_them() -> None:
    exact = dict.fromkeys(LOSSES, (0.80, 0.1)) | {
        "fapm 0.1": (0.70, 0.9),
        "fapm 0.5": (0.79, 0.6),
        "fapm 0.9": (0.8, 0.6),
    }
    report = score_reports.sweep(losses=LOSSES, exact=exact)
    for least, name in {-0.1: "fapm 0.1", -0.01: "fapm 0.5", 0.0: "fapm 0.9"}.items():
        found = advise(report, [Budget("old", least, is_exact=True)], POINTS, CONTROLS, "FT")
        assert found.chosen == name  # of as many exact matches, the lower loss
    assert "old +0 points exact" in found.line
    assert "new 60.0% exact (from 10.0%)" in found.line


def test_a_control_that_does_as_well_is_said() -> None:
    losses = LOSSES | {"random 0.9": (2.0, 1.2)}
    found = advise(score_reports.sweep(losses=losses), [Budget("old", 0.1)], POINTS, CONTROLS, "FT")
    assert found.chosen == "fapm 0.5"
    assert found.line.endswith("but random 0.9, a control, does as well")


def test_a_whole_fine_tune_within_the_budget_is_said() -> None:
    found = advise(score_reports.sweep(losses=LOSSES), [Budget("old", 0.6)], POINTS, CONTROLS, "FT")
    assert found.chosen == "fapm 0.1"
    assert "FT itself is within it" in found.line


def test_several_bounded_sets_all_hold() -> None:
    report = score_reports.report(
        {
            "BASE": {"old": (2.0, 0), "code": (1.0, 0), "new": (3.0, 0)},
            "one": {"old": (2.1, 0), "code": (1.0, 0), "new": (1.0, 0)},
            "two": {"old": (2.0, 0), "code": (1.0, 0), "new": (2.0, 0)},
        }
    )
    budgets = [Budget("old", 0.05), Budget("code", 0.5)]
    assert advise(report, budgets, ["one", "two"]).chosen == "two"
    assert advise(report, budgets[1:], ["one", "two"]).chosen == "one"  # old is a task then, too: 2.1 + 1.0 < 2.0 + 2.0
    assert advise(report, [Budget("old", 0.2), budgets[1]], ["one", "two"]).chosen == "one"


def test_the_first_set_is_bounded_where_nothing_is_said() -> None:
    assert check_budgets([], SETS) == (Budget("old", 0.02),)


@pytest.mark.parametrize(
    ("budgets", "sets", "message"),
    [
        ([Budget("odl", 1)], SETS, "names 'odl'; the prompt sets are old, new"),
        ([Budget("old", 1), Budget("old", 2)], SETS, "bounds 'old' twice"),
        ([Budget("old", 1), Budget("new", 0.1, is_exact=True)], (*SETS, "c"), "cannot be weighed together"),
        ([Budget("old", 1)], ("old",), "at least two prompt sets"),
        ([], ("old",), "at least two prompt sets"),
        ([Budget("old", 1), Budget("new", 1)], SETS, "at least two prompt sets"),
    ],
)
def test_budgets_without_a_task_are_refused(budgets: list[Budget], sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_budgets(budgets, sets)
