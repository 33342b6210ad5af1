"""The forgetting benchmark: its arithmetic against cases worked out by hand, and all of it once at toy size."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the package

from benchmarks.forgetting import claims, measures, methods, model, muon, report, runs, tasks, text  # noqa: E402
from benchmarks.forgetting.measures import Mean, backward_transfer, best_at, mean_interval, student_t  # noqa: E402
from benchmarks.forgetting.results import (  # noqa: E402
    PLAIN,
    Results,
    by_exact,
    by_loss,
    by_one,
    by_one_loss,
    general,
    new,
    over_seeds,
)
from benchmarks.forgetting.sizes import SIZES  # noqa: E402
from benchmarks.forgetting.world import World  # noqa: E402

pytestmark = pytest.mark.xdist_group("forgetting")  # one worker makes the toy that most of these look at


def _line(arm: tuple[str, str], pair: tuple[int, str], *stages: tuple[dict[str, float], float], first: int = 1) -> Any:
    """A line whose stages have these new scores and this General; losses are one minus the scores."""
    found = {
        str(first + at): {
            "new": {task: [score, 1 - score] for task, score in fresh.items()},
            "old": {"copy": [old, 1 - old], "text": [0.0, 2.0]},
        }
        for at, (fresh, old) in enumerate(stages)
    }
    return {"method": arm[0], "setting": arm[1], "seed": pair[0], "order": pair[1], "stages": found}


def _results(plain: dict[str, tuple[float, float]], others: dict[tuple[str, str], tuple[float, float]]) -> Results:
    """Three seeds with the same scores but for a shift of General by the seed's hundredths."""
    lines = []
    for seed in range(3):
        for order in "AB":
            pair, shift = (seed, order), seed / 100
            lines.append(_line(("base", "-"), pair, ({"a": 0.0}, 0.9 + shift), first=0))
            for rate, (fresh, old) in plain.items():
                lines.append(_line(("plain", rate), pair, *2 * [({"a": fresh}, old + shift)]))
            for arm, (fresh, old) in others.items():
                lines.append(_line(arm, pair, *2 * [({"a": fresh}, old + shift * 1.5)]))
    return Results(lines)


# Arithmetic.


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227)],
)
def test_students_t_is_the_table_s(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=1e-4)


def test_an_interval_is_t_times_the_standard_error() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.77645 * math.sqrt(2.5 / 5), abs=1e-4)
    assert found.seeds == 5
    assert found.decided
    assert not mean_interval([-1.0, 1.0, 2.0]).decided


def test_an_interval_of_one_value_or_none_is_not_a_number() -> None:
    assert mean_interval([2.0])[0] == 2
    assert math.isnan(mean_interval([2.0]).half)
    assert not mean_interval([2.0]).decided
    assert math.isnan(mean_interval([]).mean)


def test_equal_values_leave_no_doubt_but_zero_is_no_difference() -> None:
    assert mean_interval([1.0, 1.0]).decided
    assert not mean_interval([0.0, 0.0]).decided


def test_backward_transfer_is_the_later_change_of_all_tasks_but_the_last() -> None:
    exact = {1: {"a": 0.9}, 2: {"a": 0.5, "b": 0.8}, 3: {"a": 0.3, "b": 0.7, "c": 0.6}}
    assert backward_transfer(exact) == pytest.approx(((0.3 - 0.9) + (0.7 - 0.8)) / 2)
    assert math.isnan(backward_transfer({1: {"a": 0.9}}))


def test_a_curve_is_read_on_straight_lines() -> None:
    curve = [(0.0, 1.0), (0.4, 0.8), (0.8, 0.2)]
    assert best_at(curve, 0.2) == (pytest.approx(0.9), 0)
    assert best_at(curve, 0.6) == (pytest.approx(0.5), 0)
    assert best_at(curve, 0.8) == (0.2, 0)


def test_where_a_curve_turns_back_its_better_crossing_counts() -> None:
    curve = [(0.0, 1.0), (0.6, 0.6), (0.4, 0.1)]  # the last learning rate was too high
    assert best_at(curve, 0.5) == (pytest.approx(1 - 0.4 * 5 / 6), 0)


def test_beyond_its_ends_a_curve_is_its_end_and_says_so() -> None:
    curve = [(0.1, 1.0), (0.6, 0.6), (0.6, 0.5), (0.4, 0.1)]
    assert best_at(curve, 0.7) == (0.6, 1)
    assert best_at(curve, 0.0) == (1.0, -1)
    assert best_at([(0.1, 1.0)], 0.1) == (1.0, 0)


def test_beyond_the_ends_of_a_curve_only_what_is_better_or_worse_in_both_counts() -> None:
    curve = [(0.1, 1.0), (0.6, 0.6)]
    assert measures.above(curve, (0.35, 0.7))[0] == pytest.approx(-0.1)
    assert measures.above(curve, (0.7, 0.65))[0] == pytest.approx(0.05)  # learnt more, kept more
    assert math.isnan(measures.above(curve, (0.7, 0.5))[0])  # learnt more, kept less
    assert measures.above(curve, (0.0, 0.9))[0] == pytest.approx(-0.1)
    assert math.isnan(measures.above(curve, (0.0, 1.1))[0])
    assert measures.above(curve, (0.7, 0.6))[0] == 0
    assert [measures.above(curve, (x, 0.7))[1] for x in (0.0, 0.1, 0.35, 0.6, 0.7)] == [False, True, True, True, False]


def test_figures_of_a_line_are_means_without_the_text() -> None:
    line = _line(("plain", "1"), (0, "A"), ({"a": 0.8}, 0.7), ({"a": 0.2, "b": 0.6}, 0.5))
    found = measures.figures(line)
    assert (found.general, found.new, found.learnt, found.bwt) == pytest.approx((0.5, 0.4, 0.7, -0.6))
    assert (found.general_loss, found.new_loss, found.text_loss) == pytest.approx((0.5, 0.6, 2.0))
    assert found.single == pytest.approx((0.8, 0.7))
    assert found.single_losses == pytest.approx((0.2, 0.3))


def test_what_comes_first_is_what_the_untuned_model_is_held_against() -> None:
    found = measures.figures(_line(("base", "-"), (0, "A"), ({"b": 0.1, "a": 0.5}, 0.9), first=0))
    assert found.single == pytest.approx((0.1, 0.9))
    assert found.new == pytest.approx(0.3)


def test_without_the_stages_between_there_is_no_backward_transfer() -> None:
    line = _line(("fapm", "0.9"), (0, "A"), ({"a": 0.8}, 0.7), ({"a": 0.2, "b": 0.6}, 0.5))
    line["stages"]["3"] = line["stages"].pop("2")
    assert math.isnan(measures.figures(line).bwt)
    assert measures.figures(line).single == pytest.approx((0.8, 0.7))


def test_a_run_of_one_task_has_no_figures_of_a_sequence() -> None:
    found = measures.figures(_line(("plain", "0.6"), (0, "A"), ({"a": 0.8}, 0.7)))
    assert all(math.isnan(value) for value in (found.general, found.new, found.text_loss, found.learnt, found.bwt))
    assert found.single == pytest.approx((0.8, 0.7))
    assert found.single_text == 2.0


def test_what_learnt_one_task_is_no_point_of_the_sequence_s_curve() -> None:
    results = _results({"1": (0.8, 0.3)}, {("migu", "0.7"): (0.6, 0.6)})
    lines = [_line(("plain", "0.5"), pair, ({"a": 0.4}, 0.99)) for pair in results.untuned]
    both = Results([*results.lines, *lines])
    assert both.gain(("migu", "0.7"), by_exact) == results.gain(("migu", "0.7"), by_exact)
    assert both.gain(("migu", "0.7"), by_one).gain.mean < results.gain(("migu", "0.7"), by_one).gain.mean
    assert both.gain(("plain", "0.5"), by_exact).runs == 0


def test_a_curve_begins_where_a_method_holds_most() -> None:
    """Of the shield that is the largest setting."""
    results = _results({"1": (0.8, 0.3)}, {("shield", "0.6@2"): (0.2, 0.9), ("shield", "0.06@2"): (0.7, 0.8)})
    (curve, *_) = results.curves(by_one, "shield").values()
    assert [x for x, _ in curve] == pytest.approx([0.0, 0.2, 0.7])


def test_the_shield_wins_only_if_nothing_that_learns_comes_near_its_curve() -> None:
    shield = {("shield", "0.6@2"): (0.2, 0.9), ("shield", "0.2@2"): (0.9, 0.8)}
    claim = next(one for one in claims.CLAIMS if one.test is claims._below_shield_all)
    below = _results({"1": (0.8, 0.3)}, {**shield, ("migu", "0.7"): (0.6, 0.6), ("fapm", "0.9"): (0.01, 0.99)})
    assert claims.judge(below, claim)[0] == "confirmed here"
    above = _results({"1": (0.8, 0.3)}, {**shield, ("migu", "0.7"): (0.6, 0.95)})
    verdict, why = claims.judge(above, claim)
    assert verdict == "not confirmed here"
    assert "above it beyond its interval: migu 0.7" in why


def test_orders_of_a_seed_are_one_value() -> None:
    found = over_seeds({(0, "A"): 1.0, (0, "B"): 3.0, (1, "A"): 4.0})
    assert found.mean == pytest.approx((2 + 4) / 2)
    assert found.seeds == 2


# Comparison at a match.


def test_a_gain_is_the_height_above_the_curve_of_the_same_run() -> None:
    results = _results({"0.5": (0.4, 0.7), "1": (0.8, 0.3)}, {("migu", "0.7"): (0.6, 0.6)})
    gain = results.gain(("migu", "0.7"))
    assert gain.gain.mean == pytest.approx(0.6 - 0.5 + 0.005)  # shifts of 0, 1 and 2 hundredths: a half of each is left
    assert gain.gain.half == pytest.approx(4.30265 * 0.005 / math.sqrt(3), abs=1e-6)
    assert (gain.outside, gain.runs) == (0, 6)


def test_by_losses_the_curve_lies_the_same_way_up() -> None:
    results = _results({"0.5": (0.4, 0.7), "1": (0.8, 0.3)}, {("migu", "0.7"): (0.6, 0.6)})
    assert results.gain(("migu", "0.7"), by_loss).gain.mean == pytest.approx(
        results.gain(("migu", "0.7"), by_exact).gain.mean
    )
    assert results.gain(("migu", "0.7"), by_one_loss) == results.gain(("migu", "0.7"), by_loss)
    assert results.gain(("migu", "0.7"), by_one) == results.gain(("migu", "0.7"))


def test_what_learns_more_than_the_curve_is_counted_apart() -> None:
    results = _results({"1": (0.8, 0.3)}, {("fggm", "input-tensor-0.3"): (0.9, 0.35)})
    gain = results.gain(("fggm", "input-tensor-0.3"))
    assert gain.gain.mean == pytest.approx(0.05 + 0.005)
    assert gain.outside == 6


def test_plain_lies_on_its_own_curve_and_orders_can_be_taken_apart() -> None:
    results = _results({"0.5": (0.4, 0.7), "1": (0.8, 0.3)}, {})
    assert results.gain(("plain", "0.5")).gain.mean == pytest.approx(0)
    assert results.gain(PLAIN, orders="A").runs == 3


def test_forgetting_and_what_is_kept_are_shares_of_the_base_and_of_the_fine_tune() -> None:
    results = _results({"1": (0.8, 0.45)}, {("fapm", "0.9"): (0.6, 0.9)})
    assert results.forgotten(PLAIN, single=False).mean == pytest.approx(
        sum(1 - (0.45 + s) / (0.9 + s) for s in (0, 0.01, 0.02)) / 3
    )
    assert results.retained(("fapm", "0.9"), PLAIN, single=True).mean == pytest.approx(0.75)


def test_a_claim_needs_its_runs_and_its_interval() -> None:
    claim = next(one for one in claims.CLAIMS if one.needs == (claims.FGGM, PLAIN) and one.by == "FGGM")
    without = _results({"1": (0.8, 0.3)}, {})
    assert claims.judge(without, claim)[0] == "not testable here"
    better = _results({"1": (0.8, 0.3)}, {claims.FGGM: (0.7, 0.4)})
    assert claims.judge(better, claim)[0] == "confirmed here"
    worse = _results({"1": (0.8, 0.3)}, {claims.FGGM: (0.7, 0.2)})
    assert claims.judge(worse, claim)[0] == "not confirmed here"
    assert better.difference(claims.FGGM, PLAIN, general) == Mean(
        pytest.approx(0.105), pytest.approx(4.30265 * 0.005 / math.sqrt(3), abs=1e-6), 3
    )


# Tasks and tokens.


def test_train_and_test_share_no_question() -> None:
    every = {**tasks.BASE, **{name: tasks.new_task(name, 3) for name in tasks.ORDERS["A"]}}
    for name, task in every.items():
        train, test = (tasks.items(task, split, 200, f"{split} {name}") for split in ("train", "test"))
        assert not {question for question, _ in train} & {question for question, _ in test}
        assert len({answer for _, answer in test}) > 3


def test_a_question_has_one_answer_and_no_task_asks_another_s() -> None:
    every = {**tasks.BASE, **{name: tasks.new_task(name, 3) for name in tasks.ORDERS["A"]}}
    asked: dict[str, tuple[str, str]] = {}
    for name, task in every.items():
        for question, answer in tasks.items(task, "train", 300, name):
            assert asked.setdefault(question, (name, answer)) == (name, answer)


def test_orders_have_the_same_tasks_in_another_order() -> None:
    assert sorted(tasks.ORDERS["A"]) == sorted(tasks.ORDERS["B"])
    assert tasks.ORDERS["A"] != tasks.ORDERS["B"]


def test_over_the_seeds_every_task_comes_first() -> None:
    size = SIZES["quick"]
    for order in tasks.ORDERS:
        orders = [runs.order_of(size, order, seed) for seed in range(size.seeds)]
        assert {names[0] for names in orders} == set(size.tasks)
        assert all(sorted(names) == sorted(size.tasks) for names in orders)


def test_the_same_seed_makes_the_same_items() -> None:
    task = tasks.new_task("cipher", 1)
    assert tasks.items(task, "test", 9, "x") == tasks.items(task, "test", 9, "x")
    assert tasks.items(tasks.new_task("cipher", 2), "test", 9, "x") != tasks.items(task, "test", 9, "x")


def test_an_item_s_tokens_are_what_the_template_makes() -> None:
    tokenizer = text.new_tokenizer()
    (ids, read), *_ = text.Chat.of(tokenizer).tokens([("copy ab", "ab")])
    conversation = [{"role": "user", "content": "copy ab"}, {"role": "assistant", "content": "ab"}]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.decode(ids[read:]) == "ab<|end|>"


# Models.


@pytest.fixture(scope="module")
def llama() -> Any:
    model.be_repeatable(1)
    made = model.new_llama(len(text.new_tokenizer()), 32, 2, seed=1)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3)  # so that not all answers are alike
    yield made.eval()
    torch.use_deterministic_algorithms(False)


def test_one_forward_pass_says_what_generating_would(llama: Any) -> None:
    chat = text.Chat.of(text.new_tokenizer())
    asked = chat.tokens([(f"copy {word}", "") for word in ("a", "bc", "def", "ghij")])
    rows = []
    for at, (ids, read) in enumerate(asked):
        prompt = torch.tensor([ids[:read]])
        generated = llama.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
        answer = generated[0, read:].tolist()
        rows.append((ids[:read] + (answer if at % 2 else [*answer[:-1], (answer[-1] + 1) % 200]), read))
    assert [model.measure(llama, {"x": [row]}, "cpu")["x"].exact for row in rows] == [0, 1, 0, 1]
    assert model.measure(llama, {"x": rows}, "cpu")["x"].exact == 0.5


def test_loss_does_not_depend_on_who_shares_the_batch(llama: Any) -> None:
    rows = text.Chat.of(text.new_tokenizer()).tokens([("copy a", "a"), ("copy bcdef", "bcdef"), ("add", "12")])
    together = model.measure(llama, {"x": rows, "y": rows[:1]}, "cpu")
    apart = model.measure(llama, {"x": rows}, "cpu", batch=1)
    alone = [model.measure(llama, {"x": [row]}, "cpu")["x"].loss * (len(row[0]) - row[1]) for row in rows]
    assert together["x"].loss == pytest.approx(apart["x"].loss, rel=1e-5)
    assert together["x"].loss == pytest.approx(sum(alone) / sum(len(ids) - read for ids, read in rows), rel=1e-5)
    assert together["y"].loss == pytest.approx(alone[0] / (len(rows[0][0]) - rows[0][1]), rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_s_step_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    found = muon.orthogonal(given)
    assert float(torch.linalg.svdvals(found).min()) > 0.5
    assert float(torch.linalg.svdvals(found).max()) < 1.3
    assert float((u.mT @ found @ v.mT).diagonal(dim1=1, dim2=2).min()) > 0.5


# All of it.


def _is_tried(run: runs.Run) -> bool:
    return run.order == "A" and (run.seed == 0 or run.method in ("base", "plain"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    """Every method of the full plan once, at one setting; plain with two seeds. Lines as do_all writes them."""
    model.be_repeatable(1)
    folder = tmp_path_factory.mktemp("forgetting")
    world = World(folder / "work", SIZES["toy"])
    lines = [runs.do(world, run) for wave in runs.planned(world.size) for run in wave if _is_tried(run)]
    with (folder / "toy.jsonl").open("w") as file:
        file.writelines(json.dumps(line | {"made": {"commit": "none"}}) + "\n" for line in lines)
    yield world, folder
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_method_of_every_size_runs(toy: tuple[World, Path]) -> None:
    lines = runs.read_lines(toy[1] / "toy.jsonl")
    assert {line["method"] for line in lines} == {"base", *SIZES["full"].plan}
    assert set(SIZES["quick"].plan) <= set(SIZES["gpu"].plan) | set(SIZES["full"].plan) == set(SIZES["full"].plan)
    for line in lines:
        assert all(math.isfinite(score) for stage in line["stages"].values() for _, score in stage["old"].values())


def test_the_same_run_gives_the_same_numbers(toy: tuple[World, Path]) -> None:
    lines = {line["key"]: line["stages"] for line in runs.read_lines(toy[1] / "toy.jsonl")}
    for method in ("plain", "migu", "replay"):
        run = next(run for wave in runs.planned(SIZES["toy"]) for run in wave if run.method == method)
        assert runs.do(toy[0], run)["stages"] == lines[run.key]


def test_what_is_under_a_mask_stays(toy: tuple[World, Path]) -> None:
    world, folder = toy
    found = world.load_base()
    before = {name: weight.detach().clone() for name, weight in found.named_parameters()}
    items = world.new_items("unit", 0, "train")
    stage = methods.Stage(
        world=world,
        model=found,
        seed=0,
        number=0,
        name="unit",
        items=items,
        rows=world.chat.tokens(items),
        folder=folder,
    )
    methods.LEARN["random-rows"](stage, "0.3")
    for name, weight in found.named_parameters():
        rows = (weight != before[name]).flatten(1).any(1) if weight.ndim == 2 else (weight != before[name])
        assert int(rows.sum()) == (int(0.3 * len(rows)) if name in model.matrices(found) else 0), name


def test_a_line_cut_off_is_made_again_and_others_never(toy: tuple[World, Path], tmp_path: Path) -> None:
    whole = (toy[1] / "toy.jsonl").read_text().splitlines()
    results = tmp_path / "toy.jsonl"
    results.write_text("\n".join([*whole[:-1], whole[-1][:40]]))
    said: list[str] = []
    left = runs.do_all(toy[0], results, workers=1, threads=1, until=0.0, say=said.append)
    assert left == sum(map(len, runs.planned(SIZES["toy"]))) - len(whole) + 1
    assert said == []
    assert results.read_text().splitlines() == [*whole[:-1], whole[-1][:40]]
    assert len(runs.read_lines(results)) == len(whole) - 1


def test_a_worker_s_line_is_the_same_as_ours(toy: tuple[World, Path], tmp_path: Path) -> None:
    whole = (toy[1] / "toy.jsonl").read_text().splitlines()
    keys = {json.loads(line)["key"] for line in whole}
    gone = next(line for line in whole if "/plain/" in line)
    every = [run.key for wave in runs.planned(SIZES["toy"]) for run in wave]
    done = [line for line in whole if line != gone] + [json.dumps({"key": key}) for key in every if key not in keys]
    results = tmp_path / "toy.jsonl"
    results.write_text("\n".join(done) + "\n")
    assert runs.do_all(toy[0], results, workers=1, threads=1, until=math.inf, say=lambda line: None) == 0
    made = json.loads(results.read_text().splitlines()[-1])
    assert made["stages"] == json.loads(gone)["stages"]
    assert made["made"]["torch"] == torch.__version__


def test_results_are_written_with_verdicts_and_curves(toy: tuple[World, Path]) -> None:
    report.write(toy[1], SIZES["toy"], toy[1] / "toy.jsonl", left=3)
    written = (toy[1] / "RESULTS.md").read_text()
    assert "**3 runs are still to do**" in written
    for verdict in ("not testable here", "### Published figures", "| fapm | 0.5 |"):
        assert verdict in written
    for picture in re.findall(r"\((.*\.svg)\)", written):
        assert (toy[1] / picture).read_text().startswith("<svg")
    assert len(max(written.splitlines(), key=len)) < 400


def test_results_of_nothing_are_no_error(tmp_path: Path) -> None:
    report.write(tmp_path, SIZES["quick"], tmp_path / "quick.jsonl", left=9)
    assert "not testable here" in (tmp_path / "RESULTS.md").read_text()


def test_general_and_new_are_read_off_by_name() -> None:
    results = _results({"1": (0.8, 0.3)}, {})
    assert results.mean(PLAIN, general).mean == pytest.approx(0.31)
    assert results.mean(PLAIN, new).mean == pytest.approx(0.8)
