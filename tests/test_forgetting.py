"""The forgetting benchmark: its tasks and models, the file of lines, and all of it once at toy size."""

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

from benchmarks.forgetting import estimate, held, lines, methods, model, muon, report, runs, tasks, text  # noqa: E402
from benchmarks.forgetting.measures import Cell  # noqa: E402
from benchmarks.forgetting.posthoc import POSTHOC  # noqa: E402
from benchmarks.forgetting.results import Results  # noqa: E402
from benchmarks.forgetting.settings import Setting, grid  # noqa: E402
from benchmarks.forgetting.sizes import SIZES  # noqa: E402

pytestmark = pytest.mark.xdist_group("forgetting")  # one worker makes the toy that most of these look at


# Tasks and tokens.


def test_train_and_test_share_no_question() -> None:
    every = {**tasks.BASE, **{name: tasks.new_task(name, 3) for name in tasks.NEW}}
    for name, task in every.items():
        train, test = (tasks.items(task, split, 200, f"{split} {name}") for split in ("train", "test"))
        assert not {question for question, _ in train} & {question for question, _ in test}
        assert len({answer for _, answer in test}) > 3


def test_a_question_has_one_answer_and_no_task_asks_another_s() -> None:
    every = {**tasks.BASE, **{name: tasks.new_task(name, 3) for name in tasks.NEW}}
    asked: dict[str, tuple[str, str]] = {}
    for name, task in every.items():
        for question, answer in tasks.items(task, "train", 300, name):
            assert asked.setdefault(question, (name, answer)) == (name, answer)


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


def test_a_course_is_as_long_as_its_rates_add_up_to() -> None:
    course = model.Course(steps=4, rate=0.1, warmup=2)
    assert course.peak_steps == pytest.approx(0.5 + 0.75 + 0.5 + 0.25)
    usual = SIZES["quick"].course
    longer = usual.changed(2.5, 4)
    assert (longer.steps, longer.warmup, longer.rate) == (4 * usual.steps, 4 * usual.warmup, 2.5 * usual.rate)
    assert longer.peak_steps == pytest.approx(4 * usual.peak_steps, rel=0.05)


def test_the_divergence_from_oneself_is_nothing_and_pads_do_not_count(llama: Any) -> None:
    rows = text.Chat.of(text.new_tokenizer()).tokens([("copy a", "a"), ("copy bcdef", "bcdef")])
    with torch.no_grad():
        taught = [torch.log_softmax(llama(input_ids=torch.tensor([ids])).logits[0], -1) for ids, _ in rows]
        assert float(model.kl_from(llama, rows, taught, "cpu")) == pytest.approx(0, abs=1e-5)
        other = model.new_llama(len(text.new_tokenizer()), 32, 2, seed=2)
        wanted, count = 0.0, 0
        for (ids, _), teacher in zip(rows, taught, strict=True):
            student = torch.log_softmax(other(input_ids=torch.tensor([ids])).logits[0].double(), -1)
            wanted += float((teacher.double().exp() * (teacher.double() - student)).sum())
            count += len(ids)
        assert float(model.kl_from(other, rows, taught, "cpu")) == pytest.approx(wanted / count, rel=1e-4)


# Lines.


def test_a_run_is_read_from_its_key() -> None:
    run = runs.Run(Cell(1, 20, "cipher"), "all", "lora+shield", "1.5@2.5x4")
    assert runs.Run.of(run.key) == run


def test_a_line_cut_off_does_not_count_and_swallows_none_and_the_first_of_a_key_does(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    key = "0/0/unit/one/plain/-@1"
    path.write_text(json.dumps({"key": key, "seconds": 1}) + '\n{"key": "0/0/unit/one/migu')
    lines.begin_session(path, "cpu", 1)
    lines.add_line(path, {"key": key, "seconds": 2})
    lines.begin_session(path, "cpu", 1)
    assert lines.read_lines(path) == [{"key": key, "seconds": 1}]
    assert [made["on"] for made in lines.read_sessions(path)] == ["1 thread(s) a run"]
    assert lines.read_lines(tmp_path / "absent") == []


# All of it.


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[runs.Bench, Path]:
    """Every method of the full size at one setting, and every method's sequence, on one base."""
    model.be_repeatable(1)
    folder = tmp_path_factory.mktemp("forgetting")
    bench = runs.Bench(folder / "work", SIZES["toy"], folder / "toy.jsonl")
    seen: set[str] = set()
    for run in runs.of_one_task(bench.size, 0):
        if run.cell == Cell(0, 0, "unit") and run.method not in seen:
            seen.add(run.method)
            lines.add_line(bench.results, runs.do(bench.worlds[0], run))
    yield bench, folder
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_method_of_every_size_runs(toy: tuple[runs.Bench, Path]) -> None:
    results = Results(lines.read_lines(toy[0].results))
    every = {*held.LEARN, *POSTHOC} - {"shield-onward"}
    assert set(results.methods("one")) == every
    for size in SIZES.values():
        assert {*size.learners, *size.posthoc} <= every
        assert {*size.extra, *size.courses} <= set(size.learners)
    for line in lines.read_lines(toy[0].results):
        assert all(math.isfinite(loss) for _, loss in line["old"].values())


@pytest.mark.parametrize("method", ["plain", "regmean-onward", "lora+shield", "ewc", "replay", "fggm"])
def test_a_sequence_says_what_each_task_was_worth_and_is(method: str, toy: tuple[runs.Bench, Path]) -> None:
    run = runs.Run(Cell(0, 50, "unit"), "all", method, grid(method)[0])
    line = runs.do(toy[0].worlds[0], run)
    assert list(line["learnt"]) == list(line["new"]) == ["unit", "cipher"]
    assert line["learnt"]["cipher"] == line["new"]["cipher"]


def test_the_same_run_gives_the_same_numbers(toy: tuple[runs.Bench, Path]) -> None:
    known = {line["key"]: line for line in lines.read_lines(toy[0].results)}
    for method in ("plain", "migu", "replay", "distil"):
        run = runs.Run(Cell(0, 0, "unit"), "one", method, grid(method)[0])
        again = runs.do(toy[0].worlds[0], run)
        assert {**again, "seconds": 0} == {**known[run.key], "seconds": 0}


def test_what_is_under_a_mask_stays(toy: tuple[runs.Bench, Path]) -> None:
    world, folder = toy[0].worlds[0], toy[1]
    found = world.load_base()
    before = {name: weight.detach().clone() for name, weight in found.named_parameters()}
    items = world.new_items("unit", 0, "train")
    stage = methods.Stage(
        world=world, model=found, setting=Setting("0.3"), seed=0, number=0, name="unit", items=items, folder=folder
    )
    held.LEARN["random-rows"](stage)
    for name, weight in found.named_parameters():
        rows = (weight != before[name]).flatten(1).any(1) if weight.ndim == 2 else (weight != before[name])
        assert int(rows.sum()) == (int(0.3 * len(rows)) if name in model.matrices(found) else 0), name
    untouched = dict(world.load_base().named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in untouched.items())


def test_no_method_is_shown_an_old_task_that_is_not_probed(toy: tuple[runs.Bench, Path]) -> None:
    shown = {question.split()[0] for question, _ in toy[0].worlds[0].probes}
    asked = {name: {tasks.items(task, "test", 1, name)[0][0].split()[0]} for name, task in tasks.UNSEEN.items()}
    assert not shown & set().union(*(words for name, words in asked.items() if name != "lookup"))


def _without_sequences(bench: runs.Bench) -> list[str]:
    return [run.key for run in runs.of_one_task(bench.size, 0)]


def test_sequences_come_when_all_runs_of_one_task_are_there(toy: tuple[runs.Bench, Path]) -> None:
    bench = toy[0]
    line = lines.read_lines(bench.results)[0]
    every = [{**line, "key": key} for key in _without_sequences(bench)]
    assert runs.of_sequences(bench.size, every[:-1], 0) == []
    found = runs.of_sequences(bench.size, every, 0)
    cells = len(bench.size.sequence_cells(0))
    chosen = cells * (1 + 2 * (len(bench.size.learners) + len(bench.size.sequences)))
    more = cells * sum(map(len, bench.size.more_sequences.values()))
    assert chosen < len(found) == len(set(found)) <= chosen + more
    assert {run.cell.seed for run in found}.isdisjoint(bench.size.seeds)


def test_what_is_done_is_not_done_again_and_nothing_begins_after_the_time(
    toy: tuple[runs.Bench, Path], tmp_path: Path
) -> None:
    results = tmp_path / "toy.jsonl"
    results.write_text(toy[0].results.read_text())
    bench = runs.Bench(toy[1] / "work", toy[0].size, results)
    said: list[str] = []
    left = bench.do_all(workers=1, threads=1, until=0.0, say=said.append)
    assert left == len(_without_sequences(bench)) - len(lines.read_lines(toy[0].results))
    assert len(said) == len(bench.worlds)  # the bases alone
    assert lines.read_lines(results) == lines.read_lines(toy[0].results)


def test_a_worker_s_lines_are_the_same_as_ours_and_the_sequences_follow(
    toy: tuple[runs.Bench, Path], tmp_path: Path
) -> None:
    whole = {line["key"]: line for line in lines.read_lines(toy[0].results)}
    results, gone = tmp_path / "toy.jsonl", "0/0/unit/one/shield/5@0.4"
    bench = runs.Bench(toy[1] / "work", toy[0].size, results)
    for key in _without_sequences(bench):
        if key != gone:
            lines.add_line(results, {**whole.get(key, whole[gone]), "key": key})
    pretended = [run.key for run in runs.of_sequences(bench.size, [*lines.read_lines(results), whole[gone]], 0)]
    for key in pretended[1:]:
        lines.add_line(results, {**whole[gone], "key": key})
    assert bench.do_all(workers=1, threads=1, until=math.inf, say=lambda line: None) == 0
    made = {line["key"]: line for line in lines.read_lines(results)}
    assert {**made[gone], "seconds": 0} == {**whole[gone], "seconds": 0}
    assert set(made) == {*_without_sequences(bench), *pretended}


def test_results_are_written_with_verdicts_and_curves(toy: tuple[runs.Bench, Path]) -> None:
    bench, folder = toy
    report.write(folder, bench.size, bench.results, left=3)
    written = (folder / "RESULTS.md").read_text()
    assert "**3 runs are still to do**" in written
    for part in ("not run", "### The sequence", "| fapm | 0.5 |", "| shield | 5@0.4 |"):
        assert part in written
    for picture in re.findall(r"\((.*\.svg)\)", written):
        drawn = (folder / picture).read_text()
        assert drawn.startswith("<svg")
        height = int(re.findall(r'viewBox="0 0 \d+ (\d+)"', drawn)[0])
        lines = map(float, re.findall(r'<text x="[^"]*" y="([^"]*)"', drawn))
        assert max(lines) < height - 5  # also the last of the legend
    assert len(max(written.splitlines(), key=len)) < 400


def test_results_of_nothing_are_no_error(tmp_path: Path) -> None:
    report.write(tmp_path, SIZES["quick"], tmp_path / "quick.jsonl", left=9)
    assert "not run" in (tmp_path / "RESULTS.md").read_text()


def test_an_estimate_counts_what_is_left(tmp_path: Path) -> None:
    bench = runs.Bench(tmp_path / "work", SIZES["toy"], tmp_path / "toy.jsonl")
    said = estimate.estimate(bench, 2)
    torch.use_deterministic_algorithms(False)
    assert f"{len(_without_sequences(bench))} runs of one task" in said
    assert "2 bases" in said
    assert re.search(r"about \d+ minutes with 2 workers", said)
