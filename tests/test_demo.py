"""The demo: real checkpoints, each made once, never half there; and what fapm makes of them."""

import calendar
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from fisherkit.cli import app
from fisherkit.errors import OutputError
from fisherkit.methods.demo import files, fine_tune, held_out, model
from fisherkit.methods.demo.corpus import Corpus, read_corpus
from fisherkit.methods.demo.model import Recipe, make_model
from fisherkit.methods.demo.tasks import in_words, task_conversations
from fisherkit.methods.demo.training import Course, mean_loss, windows
from fisherkit.methods.score.report import ScoreReport
from fisherkit.methods.score.score import score
from fisherkit.options import ExtractOptions

SMALL = Recipe(vocabulary=600, hidden=64, layers=2, steps=60, window=64, held_out=8)
COURSE = Course(steps=40, window=64, held_out=8, learning_rate=2e-3, embedding_rate=1e-2)
CONVERSATIONS = 200


@pytest.fixture(scope="module", autouse=True)
def _little_text() -> Iterator[None]:
    corpus = read_corpus(100_000)
    with pytest.MonkeyPatch.context() as patch:
        for room in (model, held_out):
            patch.setattr(room, "read_corpus", lambda: Corpus(corpus.conversations[::5], corpus.plain))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[tuple[str, int, int]]]:
    """A small demo model, what was said, and the progress that was reported."""
    folder, said, seen = tmp_path_factory.mktemp("demo") / "new" / "folder", [], []
    model = make_model(folder, say=said.append, track=lambda *at: seen.append(at), seconds=30, recipe=SMALL)
    assert model == folder / "model"
    return model, said, seen


def write_whole(folder: Path) -> Path:
    return make_model(folder, recipe=replace(SMALL, steps=2))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_checkpoint_is_sharded_bf16_and_loads_as_any_other(made: Any) -> None:
    folder = made[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) >= 3
    assert {path.name for path in folder.glob("*.safetensors")} == shards
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(loading.values())
    assert len(model.model.layers) == SMALL.layers
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_tokenizer_keeps_text_and_knows_its_marks(made: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    text = 'def f(x):\n\treturn "Straße, 東京"  # ✓'
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for mark in ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"):
        assert len(tokenizer(mark, add_special_tokens=False).input_ids) == 1


def test_the_chat_template_has_one_bos_and_renders_prefixes_as_prefixes(made: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    turns = [{"role": role, "content": f"says {role}"} for role in ("system", "user", "assistant")]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == (
        "<s><|system|>\nsays system<|end|>\n<|user|>\nsays user<|end|>\n<|assistant|>\nsays assistant<|end|>\n"
    )
    asked = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(asked)
    assert asked.endswith("<|assistant|>\n")
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_generation_stops_at_the_end_of_a_turn(made: Any) -> None:
    tokenizer, found = AutoTokenizer.from_pretrained(made[0]), GenerationConfig.from_pretrained(made[0])
    assert found.bos_token_id == tokenizer.bos_token_id
    assert set(found.eos_token_id) == set(tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"]))


def test_it_learns_and_says_so(made: Any) -> None:
    _, said, seen = made
    line = next(line for line in said if line.startswith("Loss"))
    before, after = (
        float(line.split()[i]) for i in (line.split().index("before,") - 1, line.split().index("after") - 1)
    )
    assert before == pytest.approx(torch.tensor(float(SMALL.vocabulary)).log().item(), abs=0.2)
    assert after < before - 0.5
    assert (seen[0], seen[-1]) == (("training", 0, 100), ("training", 100, 100))
    assert all(earlier[1] <= later[1] for earlier, later in pairwise(seen))


def test_a_second_run_uses_what_is_there(made: Any) -> None:
    folder, said = made[0], []
    before = contents(folder)
    assert make_model(folder.parent, say=said.append, recipe=SMALL) == folder
    assert contents(folder) == before
    assert [line.startswith(f"{folder}: made by an earlier run") for line in said] == [True]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_draws_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_whole(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_time_ends_training(tmp_path: Path) -> None:
    said: list[str] = []
    make_model(tmp_path, seconds=1e-9, recipe=SMALL, say=said.append)
    assert any(line.endswith(f" after {SMALL.window} tokens") for line in said)


def test_the_callers_random_state_and_threads_stay_as_they_are(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    torch.set_num_threads(2)
    try:
        write_whole(tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.rand(3).equal(expected)


def test_one_machine_makes_the_same_weights_twice(tmp_path: Path) -> None:
    models = [write_whole(tmp_path / name) for name in ("a", "b")]
    first, second = ({path.name: path.read_bytes() for path in model.iterdir()} for model in models)
    assert first == second


def test_what_a_killed_run_left_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "model.partial"
    left.mkdir()
    (left / "config.json").write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr(files, "swap_in", lambda staged, target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path)
    assert list(tmp_path.iterdir()) == []
    left.mkdir()
    assert (write_whole(tmp_path) / "config.json").exists()
    assert not left.exists()


@pytest.mark.parametrize("lost", ["model-00001-of-*.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_a_model_with_a_file_missing_is_made_anew(tmp_path: Path, lost: str) -> None:
    folder = write_whole(tmp_path)
    names = {path.name for path in folder.iterdir()}
    next(folder.glob(lost)).unlink()
    assert write_whole(tmp_path) == folder
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize("config", [None, '{"model_type": "llama"}', "not json", "[]", "3"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(config)
    before = contents(tmp_path / "model")
    with pytest.raises(OutputError, match=r"model: .*demo.*--folder$"):
        write_whole(tmp_path)
    assert contents(tmp_path / "model") == before


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said: list[str] = []
    with pytest.raises(OutputError, match=r"file.model: .*Not a directory$"):
        make_model(tmp_path / "file", recipe=SMALL, say=said.append)
    assert said == []  # known before the training, not after
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OutputError, match=r"model: .*No space left"):
        write_whole(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_text_is_bounded_and_the_same_each_time() -> None:
    corpus = read_corpus()
    assert read_corpus() == corpus
    assert 500_000 < sum(map(len, corpus.texts())) < 3_000_000
    assert len(corpus.conversations) > 500
    for conversation in corpus.conversations:
        assert [turn["role"] for turn in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        assert all(turn["content"].strip() for turn in conversation)
    assert read_corpus(0).plain == ()


# The fine-tune


@pytest.fixture(scope="module")
def tuned(made: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A fine-tune of the small model, and what was said."""
    said: list[str] = []
    target = tmp_path_factory.mktemp("tuned") / "tuned"
    assert tune(made[0], target, say=said.append) == target
    return target, said


def tune(base: Path, target: Path, **options: Any) -> Path:
    return fine_tune.tune_model(base, target, seconds=30, course=COURSE, conversations=CONVERSATIONS, **options)


def test_the_fine_tune_learns_the_new_text_and_forgets_the_old(made: Any, tuned: Any) -> None:
    tokenizer = fine_tune.load_tokenizer(made[0])
    old = model.text_windows(tokenizer, SMALL).part(0, SMALL.held_out)
    new = fine_tune._task_windows(tokenizer, COURSE, CONVERSATIONS).part(0, COURSE.held_out)
    base, after = (
        [mean_loss(fine_tune.load(folder).float(), text) for text in (old, new)] for folder in (made[0], tuned[0])
    )
    assert after[1] < base[1] - 0.5
    assert after[0] > base[0]
    losses = [line for line in tuned[1] if line.startswith("Loss")]
    assert [f"{base[1]:.2f} before" in line for line in losses] == [True]  # bf16 as loaded, float32 in training


def test_the_fine_tune_is_of_the_same_layout_and_type(made: Any, tuned: Any) -> None:
    base, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (made[0], tuned[0]))
    assert {name: (t.shape, t.dtype) for name, t in base.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert all(not base[name].equal(after[name]) for name in base)


def test_the_fine_tune_is_used_again_for_its_own_base_only(made: Any, tuned: Any, tmp_path: Path) -> None:
    before, said = contents(tuned[0]), []
    assert tune(made[0], tuned[0], say=said.append) == tuned[0]
    assert contents(tuned[0]) == before
    assert [line.startswith(f"{tuned[0]}: made of {made[0]} by an earlier run") for line in said] == [True]
    other = make_model(tmp_path, recipe=replace(SMALL, steps=2, seed=1))
    shutil.copytree(tuned[0], tmp_path / "tuned")
    tune(other, tmp_path / "tuned")
    assert contents(tmp_path / "tuned") != before
    assert (tmp_path / "tuned" / "config.json").read_bytes() != before["config.json"][1]


def test_a_base_is_no_fine_tune(made: Any, tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "tuned")
    assert not files.is_reusable(tmp_path / "tuned", "a fingerprint")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a model of the demo"):
        tune(made[0], tmp_path / "mine")


def test_only_answers_are_learnt(made: Any) -> None:
    tokenizer = fine_tune.load_tokenizer(made[0])
    learnt = [tokenizer.decode(ids) for ids, learnt in fine_tune._task_pieces(tokenizer, COURSE, 8) if learnt]
    asked = [tokenizer.decode(ids) for ids, learnt in fine_tune._task_pieces(tokenizer, COURSE, 8) if not learnt]
    conversations = held_out.learnt_tasks(8, COURSE.seed)
    assert learnt == [f"{answer['content']}<|end|>\n</s>" for _, answer in conversations]
    assert asked == [f"<s><|user|>\n{question['content']}<|end|>\n<|assistant|>\n" for question, _ in conversations]


def test_what_the_sets_ask_neither_model_has_learnt(tmp_path: Path) -> None:
    sets = held_out.write_sets(tmp_path)
    rows = {name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for name, path in sets.items()}
    assert {name: len(held) for name, held in rows.items()} == {"old": held_out.ROWS, "new": held_out.ROWS}
    corpus = held_out.read_corpus()
    learnt = held_out.learnt_corpus(corpus)
    assert learnt.plain == corpus.plain
    tasks = held_out.learnt_tasks(CONVERSATIONS, 0)
    assert len(set(map(str, tasks))) == CONVERSATIONS
    for name, conversations in (("old", learnt.conversations), ("new", tasks)):
        answers = {turn["content"] for turns in conversations for turn in turns}
        questions = {turns[0]["content"] for turns in conversations}
        pairs = {(turns[0]["content"], turns[1]["content"]) for turns in conversations}
        assert not any((row["prompt"], row["completion"]) in pairs for row in rows[name])
        if name == "new":
            assert not any(row["prompt"] in questions for row in rows[name])
        assert len({row["completion"] for row in rows[name]} & answers) <= 2  # an empty docstring is said twice
    kept = set(map(str, learnt.conversations))
    assert sum(str(turns) not in kept for turns in corpus.conversations) == held_out.ROWS


def test_models_of_an_earlier_demo_are_trained_anew(tmp_path: Path) -> None:
    folder = write_whole(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert files.is_reusable(folder)
    (folder / "config.json").write_text(json.dumps(config | {files.MARK: 1}))
    assert not files.is_reusable(folder)


def test_windows_hold_all_text_once_and_mask_what_is_only_read() -> None:
    pieces = [([1, 2, 3], False), ([4, 5], True), ([6], False), ([7, 8, 9], True)]
    found = windows(pieces, Course(window=4))
    rows = sorted(zip(found.ids.tolist(), found.labels.tolist(), strict=True))
    assert rows == [([1, 2, 3, 4], [-100, -100, -100, 4]), ([5, 6, 7, 8], [5, -100, 7, 8])]
    assert len(windows([], Course(window=4))) == 0
    assert len(windows([([1, 2, 3], True)], Course(window=4))) == 0


def test_the_mean_loss_is_per_token_whatever_the_windows(made: Any) -> None:
    model = fine_tune.load(made[0]).float()
    text = windows([([5, 9, 30, 41], False), ([60, 70, 80, 90, 100, 110, 120, 130], True)], Course(window=6))
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in zip(text.ids, text.labels, strict=True):
            logs = model(ids[None]).logits[0].double().log_softmax(-1)
            for at in range(1, 6):
                if labels[at] >= 0:
                    total, count = total - float(logs[at - 1, labels[at]]), count + 1
    assert mean_loss(model, text) == pytest.approx(total / count, rel=1e-5)
    assert mean_loss(model, text.part(0, 0)) == 0


def test_tasks_are_asked_once_and_answered_rightly() -> None:
    conversations = task_conversations(400)
    assert task_conversations(400) == conversations
    assert task_conversations(400, seed=1) != conversations
    questions = [conversation[0]["content"] for conversation in conversations]
    assert len(set(questions)) == 400
    for question, answer in (
        (conversation[0]["content"], conversation[1]["content"]) for conversation in conversations
    ):
        if question.startswith("Put"):
            words = question.removesuffix(".").split(": ")[1].split(", ")
            assert answer == f"In order: {', '.join(sorted(words))}."
        elif question.startswith("Which"):
            year, month, day = (int(part) for part in question.removesuffix("?").split()[-1].split("-"))
            assert answer == f"{day} {calendar.month_name[month]} {year}."


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (4521, "four thousand five hundred twenty-one"),
        (300_007, "three hundred thousand seven"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


# The command


def figures(report: ScoreReport) -> list[tuple[float, float]]:
    """Losses on both sets, by checkpoint."""
    return [(one.sets["old"].loss, one.sets["new"].loss) for one in report.checkpoints]


def test_the_command_shows_what_it_runs_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(SMALL, window=128, held_out=4)
    monkeypatch.setattr("fisherkit.cli.demo.ExtractOptions", partial(ExtractOptions, limit=8))
    monkeypatch.setattr(model, "make_model", partial(make_model, recipe=recipe))
    monkeypatch.setattr(
        fine_tune, "tune_model", partial(fine_tune.tune_model, course=COURSE, conversations=CONVERSATIONS)
    )
    folder = tmp_path / "a demo"
    done = CliRunner().invoke(app, ["demo", "--folder", str(folder)])
    assert done.exit_code == 0, done.stderr
    commands = [shlex.split(line) for line in done.stderr.splitlines() if line.startswith("$ ")]
    sides = [str(folder / "model"), str(folder / "tuned")]
    assert commands[2] == [
        "$",
        "fisherkit",
        "fapm",
        *sides,
        str(folder / "fapm"),
        "--figure",
        str(folder / "fapm.html"),
    ]
    assert [command[-2:] for command in commands[3:5]] == [["--metric", "magnitude"], ["--metric", "random"]]
    files = [str(folder / f"{name}.safetensors") for name in ("old", "new")]
    for command, side, name in zip(commands[5:7], sides, ("old", "new"), strict=True):
        words = [side, str(folder / f"learnt-{name}.jsonl"), "-o", str(folder / f"{name}.safetensors")]
        assert command == ["$", "fisherkit", "extract", *words, "--statistics", "inputs"]
    assert commands[7] == ["$", "fisherkit", "merge", *sides, str(folder / "regmean"), "--regmean", *files]
    prompts = [word for name in ("old", "new") for word in ("--prompts", f"{name}={folder / name}.jsonl")]
    models = [*sides, *(str(folder / metric) for metric in ("fapm", "magnitude", "random", "regmean"))]
    assert commands[8:] == [["$", "fisherkit", "score", *models, *prompts]]
    table = [line.split("\t") for line in done.stdout.splitlines()[-7:]]
    assert [row[0] for row in table] == ["model", "base", "tuned", "fapm", "magnitude", "random", "regmean"]
    old, new = ({row[0]: float(row[at]) for row in table[1:]} for at in (1, 2))
    scored = figures(score(models, {name: folder / f"{name}.jsonl" for name in ("old", "new")}))
    assert [(old[name], new[name]) for name in old] == scored  # the table is score's own
    assert old["base"] < old["tuned"]
    assert all(new["tuned"] < new[metric] < new["base"] for metric in ("fapm", "magnitude"))
    assert old["base"] < old["regmean"] < old["tuned"]
    assert new["tuned"] < new["regmean"] < min(new[metric] for metric in ("fapm", "magnitude", "random"))
    assert "One seed of a toy" in done.stderr
    assert (folder / "fapm.html").read_text().count("<svg ") == 2
    quiet = CliRunner().invoke(app, ["demo", "--folder", str(folder), "--quiet"])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert quiet.stdout.splitlines()[-7:] == done.stdout.splitlines()[-7:]  # models used again, the same figures
