"""Runs of score: killed and gone on with, cut short of memory, in a pipe, on a terminal; and rows of samples."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from kills import Killed, killed_after
from peft_adapters import LINEAR, train
from rich.console import Console
from terminals import in_a_terminal
from typer.testing import CliRunner

import fisherkit
from fisherkit.artefacts.score_samples import is_samples, read_samples
from fisherkit.cli import app
from fisherkit.engine.sweep import last_rows, token_figures
from fisherkit.errors import CheckpointError, OptionError, OutputError, ResumeError
from fisherkit.methods.inspect.samples import worst_samples
from fisherkit.options import ScoreOptions
from fisherkit.render import score_table

Checkpoint = Callable[[str], Path]
OPTIONS: dict[str, Any] = {"group_size": 1, "batch_tokens": 20, "dtype": "float32"}


@pytest.fixture
def models(checkpoint: Checkpoint, tmp_path: Path) -> list[Path]:
    """Two of one architecture, and one that differs in blocks, which share a tokenizer."""
    return [checkpoint("gemma4-e2b"), tiny.save("gemma4-e2b", tmp_path / "other", seed=1), checkpoint("llama")]


def score(models: list[Path], prompts: Path, out: Path, track: Any = lambda *_: None, **changes: Any) -> list[str]:
    said: list[str] = []
    options = ScoreOptions(**{**OPTIONS, **changes})
    fisherkit.score(models, {"set": prompts}, options, samples=out, track=track, say=said.append)
    return said


# Killed


@pytest.mark.parametrize("engine", ["auto", "resident"])
def test_a_resumed_run_gives_the_bits_of_an_undisturbed_one(
    engine: str, models: list[Path], prompts: Path, tmp_path: Path
) -> None:
    steps: list[int] = []
    score(models, prompts, tmp_path / "whole.jsonl", lambda *_: steps.append(1), engine=engine)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    count = len(steps)
    for at in sorted({0, 1, count // 4, count // 2, 3 * count // 4, count - 2, count - 1}):
        out = tmp_path / f"{at}.jsonl"
        with pytest.raises(Killed):
            score(models, prompts, out, killed_after(at), engine=engine)
        assert not out.exists()
        said = score(models, prompts, out, resume=True, engine=engine)
        assert any("going on with what is finished" in line for line in said)
        assert out.read_bytes() == whole
        assert not out.with_name(f"{out.name}.partial").exists()


def test_what_is_finished_is_not_done_again(models: list[Path], prompts: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    score(models, prompts, tmp_path / "whole.jsonl", lambda stage, *_: steps.append(stage))
    out, again = tmp_path / "s.jsonl", list[str]()
    with pytest.raises(Killed):
        score(models, prompts, out, killed_after(len(steps) - 1))
    score(models, prompts, out, lambda stage, *_: again.append(stage), resume=True)
    assert len(again) < len(steps) / 4


def test_a_run_with_other_models_or_prompts_is_not_gone_on_with(
    models: list[Path], prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.jsonl"
    with pytest.raises(Killed):
        score(models, prompts, out, killed_after(20))
    with pytest.raises(ResumeError, match=r"other checkpoints"):
        score(models[:2], prompts, out, resume=True)
    with pytest.raises(ResumeError, match="other prompts"):
        score(models, tiny.write_prompts(tmp_path / "p.jsonl", ["One.", "Two three."]), out, resume=True)
    lines = score(models, prompts, out)
    assert any("is left over from an earlier run and is started over" in line for line in lines)


def test_a_run_that_was_killed_while_it_wrote_ends_as_it_would_have(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are there, the picture is not; --resume replaces its own, and nobody else's."""
    from fisherkit.methods.score import run

    out, picture = tmp_path / "s.jsonl", tmp_path / "p.txt"
    beside = {picture: lambda report: report.checkpoints[0].name.encode()}
    plain = run.write_bytes

    def write_one(path: Path, content: bytes) -> None:
        if path == picture:
            raise Killed
        plain(path, content)

    monkeypatch.setattr(run, "write_bytes", write_one)
    with pytest.raises(Killed):
        fisherkit.score(checkpoint("llama"), prompts, ScoreOptions(), samples=out, beside=beside)
    whole = out.read_bytes()
    monkeypatch.setattr(run, "write_bytes", plain)
    with pytest.raises(OutputError, match=r"s\.jsonl: exists already"):
        fisherkit.score(checkpoint("llama"), prompts, ScoreOptions(), samples=out, beside=beside)
    fisherkit.score(checkpoint("llama"), prompts, ScoreOptions(resume=True), samples=out, beside=beside)
    assert out.read_bytes() == whole
    assert picture.read_text() == str(checkpoint("llama"))
    with pytest.raises(OutputError, match=r"s\.jsonl: exists already"):
        fisherkit.score(checkpoint("llama"), prompts, ScoreOptions(resume=True), samples=out, beside=beside)


def test_what_a_killed_run_might_replace_its_successor_may(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.jsonl"
    out.write_text("older")
    with pytest.raises(Killed):
        score([checkpoint("llama")], prompts, out, killed_after(1), force=True)
    assert out.read_text() == "older"
    score([checkpoint("llama")], prompts, out, resume=True)
    assert is_samples(out)


def test_a_run_without_outputs_leaves_nothing(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fisherkit.score(checkpoint("llama"), prompts)
    with pytest.raises(Killed):
        fisherkit.score(checkpoint("llama"), prompts, track=killed_after(0))
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_refused_before_any_work(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    with pytest.raises(OptionError, match=r"samples go into a file that ends in \.jsonl"):
        fisherkit.score(folder, prompts, samples=tmp_path / "s.csv")
    (tmp_path / "s.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        fisherkit.score(folder, prompts, samples=tmp_path / "s.jsonl")
    with pytest.raises(OutputError, match="there is no folder"):
        fisherkit.score(folder, prompts, samples=tmp_path / "nowhere" / "s.jsonl")
    copied = Path(shutil.copy(prompts, tmp_path / "p.jsonl"))
    with pytest.raises(OutputError, match="is an input of this run"):
        fisherkit.score(folder, copied, ScoreOptions(force=True), samples=copied)
    assert copied.read_bytes() == prompts.read_bytes()
    adapter = train(folder, tmp_path / "adapter", target_modules=LINEAR)
    with pytest.raises(OutputError, match="is an input of this run, lies inside of one"):
        fisherkit.score([folder, adapter], prompts, samples=adapter / "s.jsonl")


# Memory


def test_no_piece_of_logits_is_larger_than_it_may_be(
    models: list[Path], prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the vocabulary is: all samples together have many more tokens."""
    largest, most = [0], 5 * tiny.VOCABULARY
    monkeypatch.setattr(last_rows, "MOST_LOGITS", most)
    plain = token_figures.token_losses

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        largest[0] = max(largest[0], logits.numel())
        return plain(logits, labels)

    monkeypatch.setattr(token_figures, "token_losses", losses)
    fisherkit.score(models, prompts, ScoreOptions(batch_tokens=1000))
    assert 0 < largest[0] <= most
    assert last_rows.rows_at_a_time(262_144, 256) * 262_144 <= 1 << 24


def test_memory_holds_one_group_of_one_model_and_nothing_around_the_blocks(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fisherkit.engine.sweep import walks

    models = [checkpoint("llama"), *(tiny.save("llama", tmp_path / f"{n}", seed=n) for n in (1, 2))]
    loaded: list[int] = []
    skeletons: list[Any] = []
    plain = walks.run_blocks

    def watch(skeleton: Any, *rest: Any) -> Any:
        if skeleton not in skeletons:
            skeletons.append(skeleton)
        loaded.append(sum(p.numel() for one in skeletons for p in one.model.parameters() if not p.is_meta))
        return plain(skeleton, *rest)

    monkeypatch.setattr(walks, "run_blocks", watch)
    fisherkit.score(models, prompts, ScoreOptions(group_size=1))
    block = sum(p.numel() for p in skeletons[0].blocks[0].parameters())
    assert len(skeletons) == 3
    assert set(loaded) == {block}


def test_groups_come_model_by_model(models: list[Path], prompts: Path) -> None:
    stages: list[str] = []
    fisherkit.score(models, prompts, ScoreOptions(group_size=2), track=lambda stage, *_: stages.append(stage))
    order = list(dict.fromkeys(stage for stage in stages if "group" in stage))
    groups = [f"scoring: model {model} of 3, group {group} of 2" for group in (1, 2) for model in (1, 2, 3)]
    assert order == groups


# What one sees


def command(*words: Any) -> Any:
    return CliRunner().invoke(app, ["score", *map(str, words)])


def test_a_pipe_gets_rows_with_exact_numbers(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    models = [checkpoint("llama"), tiny.save("llama", tmp_path / "other", seed=1)]
    done = command(*models, "--prompts", f"old={prompts}", "--prompts", f"new={prompts}", "--dtype", "float32")
    header, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    report = fisherkit.score(models, {"old": prompts, "new": prompts}, ScoreOptions(dtype="float32"))
    assert header[:4] == ["checkpoint", "set", "samples", "tokens"]
    assert [row[:2] for row in rows] == [[str(model), name] for model in models for name in ("old", "new")]
    for row, wanted in zip(rows, report.records(), strict=True):
        for column, cell in zip(header, row, strict=True):
            value = wanted[column]
            assert cell == ("null" if value is None else str(value) if isinstance(value, str) else repr(value))
    assert "old: 5 prompts, field prompt" in done.stderr


def test_json_is_the_report(checkpoint: Checkpoint, prompts: Path) -> None:
    done = command(checkpoint("llama"), "--prompts", prompts, "--json", "--quiet")
    content = json.loads(done.stdout)
    assert content["measure"] == "loss"
    assert list(content["sets"]) == ["prompts"]
    assert content["checkpoints"][0]["sets"]["prompts"]["tokens"] > 0
    assert content["made"]["options"]["limit"] == 200
    assert not done.stderr


def test_a_terminal_gets_a_table_with_signs(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path / "other", seed=1)
    words = ["score", str(checkpoint("llama")), str(other), "--prompts", f"old={prompts}", "--quiet"]
    shown = in_a_terminal(f"import sys; sys.argv[1:] = {words!r}; from fisherkit.__main__ import main; main()")
    report = fisherkit.score([checkpoint("llama"), other], {"old": prompts})
    for checkpoint_score in report.checkpoints:
        found = checkpoint_score.sets["old"]
        assert f"{found.loss:.4f} ±{found.ci95:.4f}" in shown
    assert f"{found.change.difference:+.4f} ±{found.change.ci95:.4f}" in shown
    assert "changes against" in shown


@pytest.mark.parametrize(("width", "fewer"), [(60, True), (200, False)])
def test_a_narrow_terminal_goes_without_columns_but_names_stay(
    width: int, fewer: bool, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama-other"))
    report, name = fisherkit.score([checkpoint("llama"), other], {"old": prompts}, samples=tmp_path / "s.jsonl"), "x"
    named = [replace(one, name=name + str(at)) for at, one in enumerate(report.checkpoints)]
    screen = Console(file=io.StringIO(), width=width)
    score_table.draw_score(replace(report, checkpoints=tuple(named)), screen)
    score_table.draw_samples(worst_samples(tmp_path / "s.jsonl"), screen, every=True)
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert any(line.startswith("set  checkpoint  ") for line in lines)
    assert any(re.match(r"old  x0 ", line) for line in lines)
    left_out = [line for line in lines if "in a wider window" in line]
    assert bool(left_out) == fewer
    header = next(line for line in lines if line.endswith(("text", "text ")) or " text " in line)
    assert header.split() == ["checkpoint", "set", "row", "tokens", "loss", "change", "KL", "text"]


def test_one_set_of_several_files_and_names_that_are_left_out(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copy(prompts, tmp_path))
    done = command(checkpoint("llama"), "--prompts", f"a={prompts}", "--prompts", f"a={other}", "--json", "-q")
    assert json.loads(done.stdout)["sets"]["a"]["samples"] == 10
    twice = command(checkpoint("llama"), "--prompts", f"a={prompts}", "--prompts", f"a={prompts}")
    assert "is given twice, and its samples would count twice" in twice.stderr
    alike = command(checkpoint("llama"), "--prompts", prompts, "--prompts", other)
    assert "another set is called 'prompts'; name them" in alike.stderr
    builtin = command(checkpoint("llama"), "--limit", 3, "--max-length", 60, "--json", "-q")
    assert list(json.loads(builtin.stdout)["sets"]) == ["builtin"]
    assert "takes NAME=FILE" in command(checkpoint("llama"), "--prompts", "=x").stderr
    assert "--resume goes on from the folder beside" in command(checkpoint("llama"), "--resume").stderr


def test_prompts_from_a_pipe(checkpoint: Checkpoint, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Piped:
        buffer = io.BytesIO(prompts.read_bytes())

    monkeypatch.setattr(sys, "stdin", Piped())
    report = fisherkit.score(checkpoint("llama"), {"in": "-"})
    assert report.sets["in"]["samples"] == len(tiny.PROMPTS)
    with pytest.raises(OptionError, match="stdin can be read once only"):
        fisherkit.score(checkpoint("llama"), {"a": "-", "b": "-"})


# Samples


def test_inspect_shows_the_worst_samples_first(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    models = [checkpoint("llama"), tiny.save("llama", tmp_path / "other", seed=1)]
    out = tmp_path / "s.jsonl"
    fisherkit.score(models, {"set": prompts}, samples=out)
    rows = worst_samples(out).rows
    compared = [row["difference"] for row in rows if row["difference"] is not None]
    alone = [row["loss"] for row in rows if row["difference"] is None]
    assert len(compared) == len(alone) == len(tiny.PROMPTS)
    assert compared == sorted(compared, reverse=True)
    assert [row["difference"] for row in rows[: len(compared)]] == compared
    assert alone == sorted(alone, reverse=True)
    shown = CliRunner().invoke(app, ["inspect", str(out), "--sort", "-loss", "--top", "2"]).stdout.splitlines()
    losses = sorted(row["loss"] for row in rows)
    assert [line.split("\t")[4] for line in shown[1:]] == [repr(loss) for loss in losses[:2]]


def test_a_row_says_what_the_prompt_was(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Name three rivers: ", "completion": "Ebro, Tagus"}) + "\n")
    fisherkit.score(checkpoint("llama"), {"set": path}, samples=tmp_path / "s.jsonl")
    (row,) = read_samples(tmp_path / "s.jsonl")
    assert row["prompt"].strip().endswith("Name three rivers:")
    assert row["answer"].strip() == "Ebro, Tagus"
    assert (row["set"], row["row"], row["difference"]) == ("set", 1, None)


def test_the_page_of_formats_has_every_key_of_a_sample(checkpoint: Checkpoint, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.partition("## Samples of score\n")[2].partition("\n## ")[0]
    columns = " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    documented = set(re.findall(r"`(\w+)`", columns))
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "One and one is", "choices": ["two", "three"], "answer": 0}) + "\n")
    fisherkit.score(checkpoint("llama"), path, ScoreOptions(choices="choices"), samples=tmp_path / "s.jsonl")
    assert documented == {*read_samples(tmp_path / "s.jsonl")[0]}


def test_damaged_samples_name_the_line(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    fisherkit.score(checkpoint("llama"), prompts, samples=out)
    lines = out.read_text().splitlines()
    assert is_samples(out)
    out.write_text("\n".join([lines[0], lines[1].replace('"loss": ', '"loss": "x", "was": ')]) + "\n")
    with pytest.raises(CheckpointError, match="line 2: loss is 'x', not a finite number"):
        read_samples(out)
    out.write_text(lines[0] + "\n" + lines[1][:40])
    with pytest.raises(CheckpointError, match="line 2 is not valid JSON"):
        read_samples(out)
    assert not is_samples(prompts)
