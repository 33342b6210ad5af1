"""Figures of the forgetting benchmark: the task as the unit, fronts, verdicts, against slow oracles and by hand."""

import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are no part of the package

from benchmarks.forgetting import __main__ as command
from benchmarks.forgetting import report, verdicts
from benchmarks.forgetting import results as figures
from benchmarks.forgetting.choose import best_settings
from benchmarks.forgetting.measures import (
    LEVELS,
    Cell,
    Estimate,
    backward_transfer,
    by_task,
    front,
    height,
    lead,
    ratio,
    reached,
    student_t,
)
from benchmarks.forgetting.results import Results
from benchmarks.forgetting.settings import PLAIN_RATES, RATES, STRENGTHS, Setting, grid
from benchmarks.forgetting.sizes import SIZES, order_of

CELLS = [Cell(base, seed, task) for base in (0, 1, 2) for seed in (0, 1) for task in "abcde"]


# The task as the unit.


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227)],
)
def test_students_t_is_the_table_s(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=1e-4)


def slow(values: dict[Cell, float]) -> tuple[float, float]:
    """Mean and half interval over tasks, each the mean of its cells; t of four freedoms from a table."""
    tasks = [statistics.mean([value for cell, value in values.items() if cell.task == task]) for task in "abcde"]
    return statistics.mean(tasks), 2.776445 * statistics.stdev(tasks) / 5**0.5


@pytest.mark.parametrize("seed", range(5))
def test_a_mean_has_the_task_as_its_unit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = {cell: float(rng.normal(1, 2)) for cell in CELLS if rng.random() < 0.8 or cell.seed == 0}
    found = by_task(values)
    assert (found.mean, found.half) == pytest.approx(slow(values), rel=1e-5)
    assert (found.tasks, found.seeds, set(found.bases)) == (5, 2, {0, 1, 2})


def test_more_draws_of_the_same_tasks_narrow_nothing_if_they_say_the_same() -> None:
    one = {Cell(0, 0, task): float(at) for at, task in enumerate("abcde")}
    many = {Cell(base, seed, cell.task): value for cell, value in one.items() for base in (0, 1) for seed in range(9)}
    assert by_task(many).half == pytest.approx(by_task(one).half)
    assert by_task(many).mean == by_task(one).mean


def test_one_task_has_no_interval_nothing_no_mean_and_nan_is_nothing() -> None:
    one = by_task({Cell(0, 0, "a"): 2.0, Cell(0, 0, "b"): math.nan})
    assert (one.mean, one.tasks) == (2, 1)
    assert math.isnan(one.half)
    assert not one.is_decided
    assert math.isnan(by_task({}).mean)
    assert verdicts.verdict(by_task({}), figures.old) == "not run"


def test_a_difference_is_decided_where_the_interval_and_every_base_say_the_same() -> None:
    clear = {cell: 1.0 + 0.01 * cell.seed for cell in CELLS}
    assert by_task(clear).is_decided
    split = {cell: -0.1 if cell.base == 2 else value for cell, value in clear.items()}
    assert abs(by_task(split).mean) > by_task(split).half
    assert not by_task(split).is_decided
    assert not by_task(dict.fromkeys(CELLS, 0.0)).is_decided


@pytest.mark.parametrize(
    ("mean", "half", "verdict", "words"),
    [
        (0.2, 0.1, "better", "shown"),
        (-0.2, 0.1, "worse", "the other way round"),
        (0.2, 0.3, "not shown", "not shown (± 30 points)"),
        (0.01, 0.03, "equal", "equal within the margin"),
        (0.03, 0.03, "not shown", "not shown (± 3 points)"),
        (0.03, 0.02, "better", "shown"),
    ],
)
def test_a_verdict_is_one_of_four(mean: float, half: float, verdict: str, words: str) -> None:
    found = Estimate(mean, half, 5, 3, {0: mean, 1: mean})
    assert found.verdict(0.05) == verdict
    assert verdicts.verdict(found, figures.old) == words


# Fronts.


def test_a_front_is_what_nothing_beats_in_both() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(int(rng.integers(9)) / 8, int(rng.integers(9)) / 8) for _ in range(int(rng.integers(1, 10)))]
        slow_front = {
            one
            for one in points
            if not any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in points)
        }
        found = front(points)
        assert set(found) == slow_front
        assert found == sorted(found)
        assert all(a[1] > b[1] for a, b in itertools.pairwise(found))


def test_a_front_is_read_on_straight_lines_and_has_an_end() -> None:
    curve = [(0.0, 1.0), (0.4, 0.8), (0.8, 0.2)]
    wanted = {-1.0: 1.0, 0.0: 1.0, 0.2: 0.9, 0.4: 0.8, 0.6: 0.5, 0.8: 0.2}
    assert {new: height(curve, new) for new in wanted} == pytest.approx(wanted)
    assert math.isnan(height(curve, 0.81))
    assert reached(curve, (0.1, 0.8, 0.9)) == pytest.approx(2 / 3)


def test_a_lead_is_the_mean_gap_where_both_get() -> None:
    ours, theirs = [(0.0, 1.0), (1.0, 0.5)], [(0.0, 1.0), (0.5, 0.5)]
    assert lead(ours, theirs, (0.25, 0.5, 1.0)) == pytest.approx((0.125 + 0.25) / 2)
    assert lead(theirs, ours, (0.25, 0.5, 1.0)) == pytest.approx(-(0.125 + 0.25) / 2)
    assert math.isnan(lead(ours, theirs, (0.7, 0.9)))


def test_a_ratio_is_the_mean_share_where_the_other_keeps_something() -> None:
    ours, theirs = [(0.0, 0.9), (1.0, 0.6)], [(0.0, 0.9), (1.0, 0.0)]
    assert ratio(ours, theirs, (0.5, 1.0), 0.1) == pytest.approx(0.75 / 0.45)  # at 1.0 theirs keeps nothing
    assert ratio(ours, ours, (0.2, 0.7), 0.1) == 1
    assert math.isnan(ratio(ours, theirs, (1.0,), 0.1))
    assert math.isnan(ratio(ours, theirs, (1.5,), 0.1))


def test_backward_transfer_is_the_later_change_of_all_tasks_but_the_last() -> None:
    assert backward_transfer({"a": 0.9, "b": 0.8, "c": 0.1}, {"a": 0.3, "b": 0.7, "c": 0.1}) == pytest.approx(-0.35)
    assert math.isnan(backward_transfer({"a": 0.9}, {"a": 0.9}))


# Results.


def line(cell: Cell, method: str, setting: str, fresh: float, old: float, *, kind: str = "one") -> Any:
    """A line whose new and old scores are these; the old loss is one less it, the new loss falls as exp(-score)."""
    scores = {name: [old, 1 - old] for name in (*figures.PROBED, *figures.UNSEEN)}
    key = f"{cell.base}/{cell.seed}/{cell.task}/{kind}/{method}/{setting}"
    return {
        "key": key,
        "new": {cell.task: [fresh, math.exp(-fresh)]},
        "old": scores | {"text": [0.0, 2.0]},
        "seconds": 1.0,
    }


def made(arms: dict[tuple[str, str], tuple[float, float]]) -> Results:
    """All arms at every cell, old shifted a little by its task."""
    shift = {task: at / 100 for at, task in enumerate("abcde")}
    lines = [line(cell, "base", "-", 0.0, 0.9 + shift[cell.task]) for cell in CELLS]
    for (method, setting), (fresh, old) in arms.items():
        lines += [line(cell, method, setting, fresh, old + shift[cell.task]) for cell in CELLS]
    return Results(lines)


PLAIN = {("plain", "-@0.4"): (0.4, 0.7), ("plain", "-@1"): (0.8, 0.3)}


def test_a_lead_is_over_the_curve_of_the_same_cell_and_has_two_sides() -> None:
    results = made({**PLAIN, ("migu", "0.7@1"): (0.8, 0.5)})
    ours, theirs = results.lead("one", "migu", "plain"), results.lead("one", "plain", "migu")
    # From 0 to 0.8 migu falls from 0.9 to 0.5 in a line; plain is at 0.7 halfway and at 0.3 in the end.
    wanted = sum(0.9 - 0.4 * q - (0.7 - 0.8 * (q - 0.5)) for q in LEVELS) / 3
    assert ours.mean == pytest.approx(wanted)
    assert theirs.mean == pytest.approx(-wanted)
    assert results.lead("one", "migu", "plain", figures.old_loss).mean == pytest.approx(wanted)
    assert results.lead("one", "migu", "plain", figures.text_loss).mean == 0
    assert results.reach("one", "migu").mean == 1


def test_a_part_of_a_fine_tune_keeps_a_share_of_its_gain_in_loss() -> None:
    results = made({**PLAIN, ("fapm", "0.9"): (0.3, 0.8)})
    base, tuned, kept = (math.exp(-score) for score in (0.0, 0.8, 0.3))
    found = results.gain_kept("one", ("plain", "-@1"), ("fapm", "0.9"))
    assert found.mean == pytest.approx((base - kept) / (base - tuned))
    assert results.gain_kept("one", ("plain", "-@1"), ("plain", "-@1")).mean == 1
    assert math.isnan(results.gain_kept("one", ("plain", "-@0.1"), ("fapm", "0.9")).mean)


def test_longer_courses_are_no_part_of_a_curve_unless_they_are_named() -> None:
    results = made({**PLAIN, ("plain", "-@0.1x4"): (0.8, 0.9)})
    assert results.settings("one", "plain") == ["-@0.4", "-@1"]
    assert results.lead("one", "plain", "plain").mean == 0
    long = results.lead("one", "plain", "plain", of_ours=["-@0.1x4"])
    assert long.mean > 0.1


@pytest.mark.parametrize(("method", "own", "extra"), [("shield", "5@1", "1.5@1"), ("fapm", "0.5", "0.3")])
def test_settings_beside_the_grid_are_no_part_of_a_curve_unless_they_are_named(
    method: str, own: str, extra: str
) -> None:
    results = made({**PLAIN, (method, own): (0.8, 0.5), (method, extra): (0.8, 0.9)})
    without = made({**PLAIN, (method, own): (0.8, 0.5)})
    assert results.settings("one", method) == [own, extra]
    assert results.of_curve("one", method) == [own]
    assert results.lead("one", method, "plain") == without.lead("one", method, "plain")
    assert results.lead("one", method, "plain", of_ours=[own, extra]).mean > 0.1


def test_probed_and_unseen_are_taken_apart() -> None:
    assert not set(figures.PROBED) & set(figures.UNSEEN)
    found = line(CELLS[0], "plain", "-@1", 0.5, 0.25)
    for name in figures.PROBED:
        found["old"][name] = [0.75, 0.25]
    run = Results([found]).runs("one", "plain", "-@1")[CELLS[0]]
    assert [read(run) for read in (figures.probed, figures.unseen, figures.old)] == pytest.approx([0.75, 0.25, 0.5])
    assert [read(run) for read in (figures.probed_loss, figures.unseen_loss)] == pytest.approx([0.25, 0.75])
    assert figures.average(run) == pytest.approx(0.5)


# The grid, and what it chooses.


def test_every_method_that_learns_has_the_same_number_of_settings() -> None:
    assert len(RATES) == 3
    for size in SIZES.values():
        for method in size.learners:
            settings = grid(method)
            assert len(set(settings)) == 6
            if method != "plain":
                assert settings == tuple(f"{s}@{r}" for s in STRENGTHS[method] for r in RATES)
                assert len(set(STRENGTHS[method])) == 2
        for method in size.posthoc:
            assert len(set(grid(method))) == 2
    assert len(PLAIN_RATES) == 6
    assert set(RATES) < set(PLAIN_RATES)


def test_a_setting_is_read_as_it_is_written() -> None:
    for text in ("5@2.5", "-@0.1x4", "0.3@1", "16@1x16"):
        assert str(Setting.of(text)) == text
    assert Setting.of("0.9") == Setting("0.9", 1.0, 1)


@pytest.mark.parametrize("name", ["quick", "full"])
def test_tasks_are_crossed_with_draws_and_sequences_take_others(name: str) -> None:
    size = SIZES[name]
    cells = size.cells(0)
    assert len(size.tasks) >= 5
    assert len(size.seeds) >= 3
    assert len(size.bases) >= 3
    assert len(set(cells)) == len(cells) == len(size.tasks) * len(size.seeds)
    for base in size.bases:
        assert {cell.task for cell in cells if cell.base == base} == set(size.tasks)
    sequences = size.sequence_cells(0)
    assert not {cell.seed for cell in sequences} & {cell.seed for cell in cells}
    assert {cell.task for cell in sequences} == set(size.tasks)
    assert {cell.base for cell in sequences} == set(size.bases)
    assert all(sorted(order_of(size, cell.task)) == sorted(size.tasks) for cell in sequences)


def test_the_passes_of_full_make_every_draw_and_every_order_on_every_base() -> None:
    size = SIZES["full"]
    numbers = range(size.passes)
    assert sorted(cell for number in numbers for cell in size.cells(number)) == sorted(
        (base, seed, task) for base in size.bases for seed in size.seeds for task in size.tasks
    )
    orders = [(cell.base, cell.task) for number in numbers for cell in size.sequence_cells(number)]
    assert sorted(orders) == sorted((base, task) for base in size.bases for task in size.tasks)


def test_no_pass_makes_the_runs_of_another_where_bases_are_few() -> None:
    for words, passes in ((["full"], 3), (["full", "--bases", "3"], 1), (["full", "--passes", "2"], 2)):
        size = command._size(command._options(words))
        assert size.passes == passes
        cells = [cell for number in range(passes) for cell in size.cells(number)]
        assert len(cells) == len(set(cells))


def test_another_file_s_settings_are_chosen_by_its_own_draws(tmp_path: Path) -> None:
    lines = [line(Cell(base, seed, "cipher"), "base", "-", 0.0, 0.9) for base, seed in ((3, 20), (4, 21))]
    path = tmp_path / "quick-bases3-4-seeds20-21.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    size = report._size_of(path)
    assert (size.name, size.bases, size.seeds) == (path.stem, (3, 4), (20, 21))
    assert Cell(3, 20, "cipher") in size.design_cells()
    assert report._size_of(tmp_path / "quick.jsonl") == SIZES["quick"]


@pytest.mark.parametrize("name", ["quick", "full"])
def test_settings_are_chosen_by_the_first_pass_without_the_last_base(name: str) -> None:
    size = SIZES[name]
    assert size.bases[-1] not in size.design_bases()
    assert size.design_cells() < set(size.cells(0))
    assert {cell.base for cell in size.design_cells()} == set(size.bases[:-1])


def test_the_two_best_settings_are_chosen_by_the_runs_that_decide() -> None:
    worth = {"0.7@0.4": 0.3, "0.7@1": 0.8, "0.7@2.5": 0.1, "0.9@0.4": 0.5, "0.9@1": 0.2, "0.9@2.5": 0.4}
    lines = [
        line(cell, "migu", setting, 0.5, value if cell.base < 2 else 1 - value)
        for cell in CELLS
        for setting, value in worth.items()
    ]
    early, late = ({cell for cell in CELLS if (cell.base < 2) == early} for early in (True, False))
    assert best_settings(Results(lines), "migu", grid("migu"), early) == ["0.7@1", "0.9@0.4"]
    assert best_settings(Results(lines), "migu", grid("migu"), late) == ["0.7@2.5", "0.9@1"]
