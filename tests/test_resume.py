"""A run that was killed at any moment goes on to the same bits; what is not finished never looks finished."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import tiny
from fork_server import Forked
from kills import Killed, killed_after

import fisherkit
from fisherkit.errors import FisherkitError, OutputError, ResumeError
from fisherkit.options import ExtractOptions

Checkpoint = Callable[[str], Path]
OPTIONS: dict[str, Any] = {"group_size": 1, "batch_tokens": 20, "targets": "all"}


def extract(model: Path, prompts: Path, out: Path, track: Any = lambda *_: None, **changes: Any) -> list[str]:
    said: list[str] = []
    fisherkit.extract(model, prompts, out, ExtractOptions(**{**OPTIONS, **changes}), track=track, say=said.append)
    return said


# The command line with a line of progress at every step, not one a minute.
TALKATIVE = "from fisherkit.cli import progress; progress.PAUSE = 0; from fisherkit.__main__ import main; main()"


def count_steps(model: Path, prompts: Path, out: Path, **changes: Any) -> int:
    steps: list[tuple[str, int]] = []
    extract(model, prompts, out, lambda stage, done, total: steps.append((stage, done)), **changes)
    return len(steps)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma4-e2b", {}),
        ("llama", {"targets": "matrices", "batch_tokens": 40}),
        ("qwen3-moe", {"targets": "matrices"}),
        ("llama-tied", {"engine": "resident"}),
    ],
)
def test_resumed_run_gives_the_bits_of_an_undisturbed_one(
    architecture: str, changes: dict[str, Any], checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint(architecture)
    steps = count_steps(model, prompts, tmp_path / "whole.pt", **changes)
    whole = (tmp_path / "whole.pt").read_bytes()
    for at in sorted({0, 1, steps // 4, steps // 2, 2 * steps // 3, steps - 2, steps - 1}):
        out = tmp_path / f"killed-{at}" / "whole.pt"  # a .pt names its inside after itself
        out.parent.mkdir()
        with pytest.raises(Killed):
            extract(model, prompts, out, killed_after(at), **changes)
        assert not out.exists()
        said = extract(model, prompts, out, resume=True, **changes)
        assert any("going on" in line for line in said)
        assert out.read_bytes() == whole, f"killed after {at} of {steps} steps"
        assert not out.with_name(f"{out.name}.partial").exists()


def test_a_run_killed_again_and_again_gets_there(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = checkpoint("gemma4-e2b")
    extract(model, prompts, tmp_path / "fisher.safetensors")
    whole = (tmp_path / "fisher.safetensors").read_bytes()
    kills = 0
    while True:
        try:
            extract(model, prompts, tmp_path / "killed.safetensors", killed_after(12), resume=True)
            break
        except Killed:
            kills += 1
        assert kills < 50
    assert kills > 3
    assert (tmp_path / "killed.safetensors").read_bytes() == whole


def test_sigkill_leaves_no_target_and_can_be_resumed(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "fisher.pt"
    arguments = ["extract", str(model), str(prompts), "-o", str(out), "--group-size", "1", "--batch-tokens", "20"]
    process = subprocess.Popen([sys.executable, "-c", TALKATIVE, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "backward" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    extract(model, prompts, out, targets="matrices", resume=True)
    resumed = out.read_bytes()
    extract(model, prompts, out, targets="matrices", force=True)
    assert out.read_bytes() == resumed


def test_interrupt_exits_130_and_tells_how_to_go_on(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "fisher.pt"
    arguments = ["extract", str(model), str(prompts), "-o", str(out), "--group-size", "1", "--batch-tokens", "1"]
    read, write = os.pipe()
    program = Forked(["-c", TALKATIVE, *arguments], (0, 1, write))
    os.close(write)
    with open(read, encoding="utf-8") as log:
        while "forward" not in log.readline():
            pass
        program.send_signal(signal.SIGINT)
        rest = log.read()
    assert program.wait() == 130
    assert "--resume goes on with it" in rest
    assert "Traceback" not in rest
    assert (tmp_path / "fisher.pt.partial").is_dir()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"reduction": "sum"}, "options"),
        ({"group_size": 2}, "options"),
        ({"limit": 3}, "prompts"),
        ({"max_length": 4}, "prompts"),
    ],
)
def test_work_of_another_run_is_refused(
    change: dict[str, Any], what: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    with pytest.raises(Killed):
        extract(model, prompts, tmp_path / "fisher.pt", killed_after(8))
    with pytest.raises(ResumeError, match=rf"other .*{what}.*start over"):
        extract(model, prompts, tmp_path / "fisher.pt", resume=True, **change)


def test_work_on_other_weights_is_refused(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt", killed_after(8))
    other = tiny.save("llama", tmp_path / "other", seed=1)
    with pytest.raises(ResumeError, match="other model"):
        extract(other, prompts, tmp_path / "fisher.pt", resume=True)


def test_a_refused_run_of_which_no_value_is_finished_leaves_nothing(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    last = max(name for name in pairs.tensors(model) if ".layers." in name and name.endswith("q_proj.weight"))
    pairs.edit(model, last, lambda tensor: pairs.put(tensor, float("nan"), 0, 0))
    with pytest.raises(FisherkitError, match="NaN or infinite"):
        extract(model, prompts, tmp_path / "fisher.pt", engine="stream")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_resumed_run_keeps_the_batches_that_it_began_with(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"batch_tokens": None, "engine": "stream"}
    with monkeypatch.context() as patch:
        patch.setattr(ExtractOptions, "on", lambda options, device: dataclasses.replace(options, batch_tokens=20))
        with pytest.raises(Killed):
            extract(checkpoint("llama"), prompts, tmp_path / "fisher.safetensors", killed_after(8), **changes)
    extract(checkpoint("llama"), prompts, tmp_path / "fisher.safetensors", resume=True, **changes)
    extract(checkpoint("llama"), prompts, tmp_path / "again.safetensors", engine="stream")
    assert (tmp_path / "fisher.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_a_leftover_is_mentioned_and_not_used(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = checkpoint("llama")
    with pytest.raises(Killed):
        extract(model, prompts, tmp_path / "fisher.pt", killed_after(12))
    said = extract(model, prompts, tmp_path / "fisher.pt")
    assert any("left over from an earlier run" in line and "--resume" in line for line in said)
    assert not any("going on" in line for line in said)


def test_resume_without_a_leftover_starts_and_says_so(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    said = extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt", resume=True)
    assert any("nothing to resume" in line for line in said)
    assert (tmp_path / "fisher.pt").is_file()


def test_a_folder_of_the_users_is_not_taken_for_a_leftover(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "fisher.pt.partial").mkdir()
    (tmp_path / "fisher.pt.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="no work folder of ours"):
        extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt")
    assert (tmp_path / "fisher.pt.partial" / "thesis.txt").read_text() == "precious"


def test_two_runs_do_not_share_a_work_folder(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "fisher.pt"

    def second_run(stage: str, done: int, total: int) -> None:
        for resume in (False, True):
            with pytest.raises(OutputError, match="another run"):
                extract(model, prompts, out, resume=resume)

    extract(model, prompts, out, second_run)
    assert out.is_file()


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"fingerprint": 3}', "\x00"])
def test_damaged_progress_is_reported(damage: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt", killed_after(8))
    (tmp_path / "fisher.pt.partial" / "progress.json").write_text(damage)
    with pytest.raises(ResumeError, match="progress of a run"):
        extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt", resume=True)


@pytest.mark.parametrize("odd", [{"x": 1}, -1, "x"])
def test_progress_that_does_not_add_up_is_refused_or_goes_on_to_the_same_bits(
    odd: Any, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    (tmp_path / "whole").mkdir()
    extract(model, prompts, tmp_path / "whole" / "fisher.pt")
    whole = (tmp_path / "whole" / "fisher.pt").read_bytes()
    (tmp_path / "killed").mkdir()
    with pytest.raises(Killed):
        extract(model, prompts, tmp_path / "killed" / "fisher.pt", killed_after(27))
    path = "fisher.pt.partial/progress.json"
    progress = json.loads((tmp_path / "killed" / path).read_text())
    assert {"sink", "mode", "groups", "backward"} <= progress.keys()
    changes = [{key: odd} for key in progress] + [
        {"groups": [[0], [1]]},
        {"backward": 0},
        {"sink": {"tensors": {}, "histogram": []}},
        {"mode": progress["mode"] | {"engine": odd}},
    ]
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "killed", folder)
        (folder / path).write_text(json.dumps(progress | change))
        with contextlib.suppress(ResumeError):
            extract(model, prompts, folder / "fisher.pt", resume=True)
        finished = (folder / "fisher.pt").exists()
        assert not finished or (folder / "fisher.pt").read_bytes() == whole, change


def test_a_disk_that_fills_keeps_what_is_finished(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "fisher.pt"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    done = pairs.fisherkit("extract", model, prompts, "-o", out, "--group-size", "1", first=limit)
    assert done.returncode == 1
    assert "disk full" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert out.with_name("fisher.pt.partial").is_dir()


def test_existing_outputs_are_replaced_only_by_force(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "fisher.pt"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        extract(model, prompts, out)
    assert out.read_bytes() == b"precious"
    with pytest.raises(Killed):
        extract(model, prompts, out, killed_after(20), force=True)
    assert out.read_bytes() == b"precious"
    extract(model, prompts, out, force=True)
    assert out.stat().st_size > 10_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused_before_the_work(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt")


def test_a_missing_folder_is_refused_before_the_work(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(FisherkitError, match="no folder"):
        extract(checkpoint("llama"), prompts, tmp_path / "nowhere" / "fisher.pt")
    assert time.monotonic() - started < 1


def test_progress_names_finished_work_only(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt", killed_after(9))
    folder = tmp_path / "fisher.pt.partial"
    progress = json.loads((folder / "progress.json").read_text())
    for number in range(progress["forward"] + 1):
        index = json.loads((folder / f"boundary-{number}.json").read_text())
        size = (folder / f"boundary-{number}.bin").stat().st_size
        for entry in index.values():
            assert all(start < size for _, _, start in entry["tensors"])
