"""The demo model: a real checkpoint, made once, never half there."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fisherkit.errors import OutputError
from fisherkit.methods import demo
from fisherkit.methods.demo import Recipe, make_model
from fisherkit.methods.demo_text import Corpus, read_corpus

SMALL = Recipe(vocabulary=600, hidden=64, layers=2, steps=60, window=64)


@pytest.fixture(scope="module", autouse=True)
def _little_text() -> Iterator[None]:
    corpus = read_corpus(100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "read_corpus", lambda: Corpus(corpus.talks[::5], corpus.plain))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[tuple[str, int, int]]]:
    """A small demo model, what was said, and the progress that was told."""
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
        patch.setattr(demo, "swap_in", lambda staged, target: (_ for _ in ()).throw(KeyboardInterrupt))
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
    with pytest.raises(OutputError, match=r"model: is not a model of the demo; choose another --folder$"):
        write_whole(tmp_path)
    assert contents(tmp_path / "model") == before


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said: list[str] = []
    with pytest.raises(OutputError, match=r"file.model: cannot be written: Not a directory$"):
        make_model(tmp_path / "file", recipe=SMALL, say=said.append)
    assert said == []  # known before the training, not after
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(demo.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OutputError, match=r"model: cannot be written: I/O error: No space left"):
        write_whole(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_text_is_bounded_and_the_same_each_time() -> None:
    corpus = read_corpus()
    assert read_corpus() == corpus
    assert 500_000 < sum(map(len, corpus.texts())) < 3_000_000
    assert len(corpus.talks) > 500
    for talk in corpus.talks:
        assert [turn["role"] for turn in talk] == ["user", "assistant"] * (len(talk) // 2)
        assert all(turn["content"].strip() for turn in talk)
    assert read_corpus(0).plain == ()
