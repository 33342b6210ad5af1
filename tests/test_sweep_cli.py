"""Sweeps by measurement: what is scored is what would be written, and what is advised is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pairs
import pytest
import tiny
import torch
from pairs import Pair, cli, one_line, worked

import fisherkit
from fisherkit.cli import console, sweep
from fisherkit.methods.score.report import ScoreReport
from fisherkit.methods.score.score import score
from fisherkit.options import FapmOptions, MergeOptions, ScoreOptions
from fisherkit.progress import Track

OLD = ("Name three rivers.", "What is two plus two?", "Good morning to you all, what is the capital?")
NEW = ("Yes.", "Put these words in order: river, stone.", "No! Which day is it?", "Write the number two.")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two prompt sets."""
    folder = tmp_path_factory.mktemp("sets")
    return {name: tiny.write_prompts(folder / f"{name}.jsonl", texts) for name, texts in (("old", OLD), ("new", NEW))}


@pytest.fixture
def asked(sets: dict[str, Path]) -> list[str]:
    """Options that name them."""
    return [word for name, path in sets.items() for word in ("--prompts", f"{name}={path}")]


def figures(report: Any) -> dict[str, dict[str, tuple[float, float]]]:
    """Loss and exact matches by checkpoint and set, of a report or its JSON."""
    whole = report.as_json() if isinstance(report, ScoreReport) else report
    return {
        one["name"]: {name: (found["loss"], found["exact"]) for name, found in one["sets"].items()}
        for one in whole["checkpoints"]
    }


def scored(models: dict[str, Path], sets: dict[str, Path]) -> dict[str, dict[str, tuple[float, float]]]:
    """The same of checkpoints on disk."""
    found = figures(score(list(models.values()), sets, ScoreOptions()))
    return {name: found[str(path)] for name, path in models.items()}


def test_a_sweep_of_fapm_scores_what_would_be_written(
    pair: Pair, sets: dict[str, Path], asked: list[str], tmp_path: Path
) -> None:
    done = cli("fapm", *pair, "--sweep", "0.3,0.9,0.3", "--controls", *asked, "--scope", "layer", "--json")
    found = figures(json.loads(worked(done)))
    written = {"BASE": pair[0], "FT": pair[1]}
    for metric in ("fapm", "random"):
        for sparsity in (0.3, 0.9):
            written[f"{metric} {sparsity}"] = tmp_path / f"{metric}-{sparsity}"
            options = FapmOptions(metric=metric, sparsity=sparsity, scope="layer")  # type: ignore[arg-type]
            fisherkit.fapm(*pair, written[f"{metric} {sparsity}"], options)
    assert found == scored(written, sets)
    assert "advice: " in done.stderr


def test_a_sweep_of_merge_scores_what_would_be_written(
    pair: Pair, sets: dict[str, Path], asked: list[str], tmp_path: Path
) -> None:
    importance = tmp_path / "layers.json"
    importance.write_text(json.dumps([3e-6, 1e-6, 2e-5]))
    strengths = ["--layer-scale", importance, "--power", "0,1.5", "--alpha", "0.3,0.8"]
    found = figures(json.loads(worked(cli("merge", *pair, *strengths, "--controls", *asked, "--json"))))
    written = {"BASE": pair[0], "FT": pair[1]}
    for power in (0, 1.5):
        for alpha in (0.3, 0.8):
            name = f"power {power} alpha {alpha}"
            written[name] = tmp_path / name.replace(" ", "-")
            fisherkit.merge(*pair, written[name], MergeOptions(layer_scale=importance, power=power, alpha=alpha))
    for alpha in (0.3, 0.8):
        written[f"wise-ft {alpha}"] = tmp_path / f"wise-{alpha}-ft"
        fisherkit.merge(*pair, written[f"wise-ft {alpha}"], MergeOptions(alpha=alpha))
    assert found == scored(written, sets)


def test_an_adapters_points_are_scored_as_they_would_be_written(
    pair: Pair, sets: dict[str, Path], asked: list[str], tmp_path: Path
) -> None:
    weights = {name: w for name, w in pairs.tensors(pair[0]).items() if "q_proj" in name or "up_proj" in name}
    adapter = pairs.adapter(tmp_path / "adapter", weights)
    done = cli("fapm", pair[0], adapter, "--sweep", "0.1,0.8", *asked, "--json")
    assert "does not bear" not in done.stderr
    fisherkit.merge(pair[0], adapter, tmp_path / "FT")
    fisherkit.fapm(pair[0], adapter, tmp_path / "a", FapmOptions(sparsity=0.1))
    fisherkit.fapm(pair[0], adapter, tmp_path / "b", FapmOptions(sparsity=0.8))
    written = {"BASE": pair[0], "FT": tmp_path / "FT", "fapm 0.1": tmp_path / "a", "fapm 0.8": tmp_path / "b"}
    assert figures(json.loads(worked(done))) == scored(written, sets)


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3-moe", "gpt2", "gemma4-e2b", "gemma4-31b"])
def test_models_of_every_layout_are_scored_as_they_would_be_written(
    architecture: str, sets: dict[str, Path], asked: list[str], tmp_path: Path
) -> None:
    both = pairs.make(tmp_path, architecture, torch.float32)
    found = figures(json.loads(worked(cli("fapm", *both, "--sweep", "0.4", "--scope", "global", *asked, "--json"))))
    fisherkit.fapm(*both, tmp_path / "out", FapmOptions(sparsity=0.4, scope="global"))
    assert found == scored({"BASE": both[0], "FT": both[1], "fapm 0.4": tmp_path / "out"}, sets)


def test_a_group_that_does_not_fit_is_lowered_and_said(
    pair: Pair, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("fapm", *pair, "--sweep", "0.3,0.6", *asked, "--json")
    wanted = figures(json.loads(worked(cli(*words))))
    monkeypatch.setattr(sweep, "room_for_points", lambda: 30_000)
    done = cli(*words)
    assert "group size lowered from 8 to 1: what the points keep of more would not fit the memory" in done.stderr
    assert figures(json.loads(worked(done))) == wanted


def test_the_point_that_is_advised_is_written(pair: Pair, asked: list[str], tmp_path: Path) -> None:
    words = ("--sweep", "0.2,0.5,0.8", "--budget", "old:+100")
    done = cli("fapm", *pair, tmp_path / "out", *words, *asked, "--sparse", tmp_path / "d.safetensors")
    worked(done)
    line = next(line for line in done.stderr.splitlines() if line.startswith("advice: "))
    sparsity = float(line.split(":")[1].split()[1])
    fisherkit.fapm(*pair, tmp_path / "alone", FapmOptions(sparsity=sparsity))
    assert pairs.same_checkpoint(tmp_path / "out", tmp_path / "alone")
    fisherkit.merge(pair[0], tmp_path / "d.safetensors", tmp_path / "again")
    assert pairs.same_checkpoint(tmp_path / "again", tmp_path / "alone")
    done = cli("merge", *pair, tmp_path / "merged", "--alpha", "0.4", "--budget", "old:+100", *asked)
    assert "advice: merge: " in done.stderr
    fisherkit.merge(*pair, tmp_path / "wise", MergeOptions(alpha=0.4))
    assert pairs.same_checkpoint(tmp_path / "merged", tmp_path / "wise")


def test_nothing_is_written_where_no_point_is_within_the_budget(pair: Pair, asked: list[str], tmp_path: Path) -> None:
    for command in (("fapm", "--sweep", "0.2,0.5"), ("merge", "--alpha", "0.2,0.5")):
        done = cli(command[0], *pair, tmp_path / "out", *command[1:], "--budget", "new:+0", *asked)
        assert done.returncode == 1
        assert done.stdout.startswith("checkpoint\t")  # what was measured is not lost
        assert "nothing is written: no point stays within new:+0" in done.stderr.splitlines()[-1]
        assert not list(tmp_path.iterdir())


def test_pictures_and_figures_are_made_of_the_sweep(pair: Pair, asked: list[str], tmp_path: Path) -> None:
    beside = ("--figure", tmp_path / "s.html", "--report", tmp_path / "s.json")
    table = worked(cli("merge", *pair, "--alpha", "0.2,0.5", *beside, *asked))
    whole = json.loads((tmp_path / "s.json").read_text())
    assert whole["advice"]["line"] in (tmp_path / "s.html").read_text()
    assert set(whole["front"]) <= {"BASE", "FT", "alpha 0.2", "alpha 0.5"}
    names = [one["name"] for one in whole["checkpoints"]]
    assert names == ["BASE", "FT", "alpha 0.2", "alpha 0.5"]
    assert all(name in table for name in names)
    again = cli("merge", *pair, "--alpha", "0.2,0.5", *beside, *asked)
    assert "exists already" in one_line(again)
    worked(cli("merge", *pair, "--alpha", "0.2", *beside, *asked, "--force"))


@pytest.mark.parametrize("stage", ["scoring", "writing"])
def test_a_killed_sweep_goes_on_to_the_same_outputs(
    pair: Pair, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    words = ("--sweep", "0.2,0.6", "--scope", "layer", "--controls", "--budget", "old:+100", "--group-size", "1")
    alone = ("fapm", *pair, tmp_path / "alone", *words, *asked, "--report", tmp_path / "alone.json")
    worked(cli(*alone))
    wanted = figures(json.loads((tmp_path / "alone.json").read_text()))
    for steps in (1, 6, 11):
        killed = ("fapm", *pair, tmp_path / "out", *words, *asked, "--report", tmp_path / "out.json")
        with monkeypatch.context() as patch:
            patch.setattr(console, "tracker", lambda *_, n=steps, **__: interrupted_after(n, stage))
            done = cli(*killed)
        assert done.returncode == 130
        assert f"{tmp_path / 'out'}.sweep.partial" in done.stderr
        assert not (tmp_path / "out").exists()
        worked(cli(*killed, "--resume"))
        assert figures(json.loads((tmp_path / "out.json").read_text())) == wanted
        assert pairs.same_checkpoint(tmp_path / "out", tmp_path / "alone")
        assert not list(tmp_path.glob("*.partial"))
        assert "exists already" in one_line(cli(*killed, "--resume"))  # at once: there is nothing to go on with
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out.json").unlink()


def interrupted_after(steps: int, stage: str) -> Track:
    """Progress that interrupts the run at the so-manieth step of a stage."""
    seen = []

    def track(at: str, done: int, total: int) -> None:
        seen.append(at)
        if sum(one.startswith(stage) for one in seen) == steps:
            raise KeyboardInterrupt

    return track


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("fapm", ["--sweep", "0.5", "--budget", "old:1"], "--budget is for a sweep that is scored; add --prompts"),
        ("fapm", ["--sweep", "0.5", "--controls"], "--controls is for a sweep that is scored"),
        ("merge", ["--alpha", "0.1,0.5"], "2 points, such as alpha 0.1, are a sweep, which prompts judge"),
        ("merge", ["--alpha", "x"], "--alpha takes a number, or several such as 0.1,0.3,0.5, not 'x'"),
        ("merge", ["--alpha", "0.1,"], "--alpha takes a number"),
        ("merge", ["--figure", "a.html"], "nothing to write: give OUT"),
        ("merge", ["o", "--figure", "a.html"], "a sweep that is scored; add --prompts"),
        ("merge", [], "nothing to write: give OUT"),
    ],
)
def test_sweeps_without_prompts_are_refused(command: str, words: list[str], message: str, pair: Pair) -> None:
    assert message in one_line(cli(command, *pair, *words), 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "0.5", "--budget", "odl:1"], "--budget names 'odl'; the prompt sets are old, new"),
        (["--sweep", "0.5", "--budget", "old"], "--budget takes NAME:"),
        (["--sweep", "0.5,2"], "--sweep must lie between 0 and 1"),
        ([], "--prompts is for --sweep"),
        (["--sweep", "0.5", "--dry-run"], "it goes without --sweep"),
        (["--sweep", "0.5", "--metric", "dare", "--sparse", "d.safetensors"], "--sparse is for metrics that select"),
        (["--sweep", "0.5", "--figure", "a.pdf"], "a figure ends in"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused_before_any_work(
    words: list[str], message: str, pair: Pair, asked: list[str]
) -> None:
    assert message in one_line(cli("fapm", *pair, *words, *asked), 2)


def test_one_set_of_prompts_judges_nothing(pair: Pair, asked: list[str]) -> None:
    error = one_line(cli("fapm", *pair, "--sweep", "0.5", *asked[:2]), 2)
    assert "at least two prompt sets: --prompts old=FILE --prompts new=FILE" in error


def test_outputs_that_are_taken_are_refused_before_any_work(pair: Pair, asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for words in (["fapm", *pair, tmp_path / "out", "--sweep", "0.5"], ["merge", *pair, tmp_path / "out"]):
        assert "exists already" in one_line(cli(*words, *asked))
    error = one_line(cli("merge", *pair, pair[1] / "out", *asked))
    assert "is FT itself, or one lies inside" in error


def test_a_sweep_that_no_prompts_judge_writes_no_checkpoint(pair: Pair, tmp_path: Path) -> None:
    error = one_line(cli("fapm", *pair, tmp_path / "out", "--sweep", "0.5"), code=2)
    assert "--sweep without --prompts only reports; drop OUT, or add --prompts" in error


def test_what_cannot_be_read_is_one_line(pair: Pair, asked: list[str], tmp_path: Path) -> None:
    broken = pairs.changed(
        pair[1], tmp_path / "broken", lambda n, w: pairs.put(w, float("nan"), 3) if "1.mlp.up" in n else w
    )
    error = one_line(cli("fapm", pair[0], broken, "--sweep", "0.5", *asked, "-q"))
    assert "FT's tensor 'model.layers.1.mlp.up_proj.weight' has 1 NaN" in error
    done = cli("fapm", pair[0], broken, "--sweep", "0.5", "--nan", "keep-base", *asked)
    assert worked(done)
    missing = ["--prompts", f"old={tmp_path / 'no.jsonl'}", *asked[2:]]
    assert "no.jsonl" in one_line(cli("fapm", *pair, "--sweep", "0.5", *missing, "-q"))
