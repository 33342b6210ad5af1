"""Progress: one bar over a whole run on a terminal, and anywhere else a line at once and at most one a minute."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from terminals import in_a_terminal

from fisherkit.cli import console, progress
from fisherkit.engine.model.memory import used_bytes
from fisherkit.methods.extract import whole_run as module
from fisherkit.methods.extract.measure import extract
from fisherkit.methods.extract.whole_run import WholeRun
from fisherkit.options import ExtractOptions

Checkpoint = Callable[[str], Path]
Call = tuple[str, int, int]

CPU = torch.device("cpu")


class Clock:
    """A clock that goes on by ``step`` seconds at each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, **given: str
) -> list[str]:
    """What is said of a stage of 1000 parts that takes so many seconds."""
    monkeypatch.setattr(progress, "time", Clock(seconds / 1000))
    track = console.tracker("extract", **given)
    for done in range(1001):
        track("sweep", done, 1000)
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()


# Lines


def test_a_line_comes_at_once_and_then_one_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(monkeypatch, capsys, 600, begin="loading")
    assert lines[0] == "extract: loading"
    assert len(lines) == 10
    assert lines[5] == "extract: sweep, 50 %, 5 min left"


def test_a_short_run_says_that_it_began_and_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(monkeypatch, capsys, 59, begin="loading") == ["extract: loading"]
    assert said(monkeypatch, capsys, 59) == ["extract: sweep, 0 %"]


def test_many_short_stages_are_no_more_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "time", Clock(1.0))
    track = console.tracker("fapm")
    for stage in range(100):
        for done in range(3):
            track(f"stage {stage}", done, 2)
    track("write", 0, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fapm: stage 0, 0 %"
    assert len(lines) <= 6


def test_the_time_left_is_reckoned_from_what_this_process_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "time", Clock(61.0))
    track = console.tracker("extract")
    track("measuring: resumed", 90, 100)
    track("measuring: backward", 95, 100)
    assert capsys.readouterr().err.splitlines()[1] == "extract: measuring: backward, 95 %, 61 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    track = console.tracker("extract", quiet=True, begin="loading")
    for done in range(11):
        track("sweep", done, 10)
    assert capsys.readouterr() == ("", "")


# Bars

WHOLE = (
    "import time; from fisherkit.cli import console; t = console.tracker('read', begin='loading')\n"
    "for i in range(41): t(f'all: group {1 + i // 20} of 2', i, 40); time.sleep(0.01)"
)


def test_a_terminal_gets_one_bar_whose_details_change() -> None:
    text = in_a_terminal(WHOLE, PYTHONUNBUFFERED="1")
    assert text.startswith("read: loading\r\n")
    assert "\r" in text.replace("\r\n", "")
    assert "read: all:" in text
    assert "group 1 of 2" in text


def test_lines_stand_in_for_bars_that_are_off() -> None:
    assert in_a_terminal(WHOLE, TQDM_DISABLE="1") == "read: loading\r\n"


# A whole run of extract


def stages(checkpoint: Path, prompts: Path, out: Path, **options: object) -> list[Call]:
    calls: list[Call] = []
    extract(
        checkpoint,
        prompts,
        out,
        ExtractOptions(group_size=2, **options),  # type: ignore[arg-type]
        track=lambda *call: calls.append(call),
    )
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_tokens": 8},
        {"targets": "all"},
        {"layers": (2,)},
        {"engine": "resident"},
        {"statistics": "activations"},
    ],
)
def test_a_run_is_one_stage_that_only_grows_and_ends_whole(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    calls = stages(checkpoint("llama"), prompts, tmp_path / "f.safetensors", **options)
    assert {stage.partition(":")[0] for stage, _, _ in calls} == {"measuring"}
    assert len({total for _, _, total in calls}) == 1
    done = [done for _, done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][2]
    assert all("GB" in stage for stage, _, _ in calls if "prompts" not in stage)


def test_groups_are_counted_in_both_sweeps(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    calls = stages(checkpoint("llama"), prompts, tmp_path / "f.safetensors")  # three layers: groups of two and one
    sweeps = list(dict.fromkeys(", ".join(stage.split(", ")[:2]) for stage, _, _ in calls if "prompts" not in stage))
    assert sweeps == [
        "measuring: forward, group 1 of 2",
        "measuring: backward, group 1 of 2",
        "measuring: backward, group 2 of 2",
    ]


def test_samples_per_second_are_those_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", Clock(10.0))
    calls: list[Call] = []
    run = WholeRun(40, {"forward": 4, "backward": 8}, 4, CPU, lambda *call: calls.append(call))
    for done in range(1, 5):
        run("forward", done, 4)
    for done in range(1, 9):
        run("backward", done, 8)
    assert [done for _, done, _ in calls] == [1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28]
    assert "samples/s" not in calls[0][0]  # no time has gone by yet
    # 28 units in 110 seconds make 40 samples: the first call came when its own unit was done already.
    assert f"{40 / 110:.3g} samples/s" in calls[-1][0]


def test_memory_in_use_is_that_of_this_process() -> None:
    before = used_bytes(CPU)
    held = torch.ones(50_000_000)
    assert 150e6 < used_bytes(CPU) - before < 400e6
    assert before > 20e6
    del held
