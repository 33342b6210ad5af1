"""One of two ranks killed at a random moment: the other one ends, and both together go on to the same bits."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kill_scenarios import number_of_kills, snapshot
from ranks_launch import Launch

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
Checkpoint = Callable[[str], Path]
SUPPORT = Path(__file__).parent / "support"
WATCHED = (
    "import os, sys; sys.path.insert(0, {support!r}); from watched import watch; os.fsync = lambda descriptor: None\n"
    "watch({kill_at}, os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND))\n0"
)


def start(command: list[object], folder: Path, kills: tuple[int, int]) -> Launch:
    """Start two ranks that write down their changes of the file system, and die before the n-th (0: do not)."""
    folder.mkdir(exist_ok=True)
    first = {
        rank: WATCHED.format(support=str(SUPPORT), kill_at=kill_at, log=str(folder.parent / f"{folder.name}.{rank}"))
        for rank, kill_at in enumerate(kills)
    }
    return Launch(2, *command, first=first, cwd=folder)


@pytest.fixture(scope="module")
def command(checkpoint: Checkpoint, prompts: Path) -> list[object]:
    few = ("--group-size", "1", "--batch-tokens", "20", "--statistics", "activations")
    return ["extract", checkpoint("llama"), prompts, "-o", "fisher.pt", *few]


@pytest.fixture(scope="module")
def whole(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two undisturbed ranks make."""
    folder = tmp_path_factory.mktemp("undisturbed") / "whole"
    for rank in start(command, folder, (0, 0)).wait():
        assert rank.returncode == 0, rank.stderr
    return folder


def test_the_same_number_of_ranks_gives_the_same_bits(command: list[object], whole: Path, tmp_path: Path) -> None:
    for rank in start(command, tmp_path / "again", (0, 0)).wait():
        assert rank.returncode == 0, rank.stderr
    assert snapshot(tmp_path / "again") == snapshot(whole)


@pytest.mark.parametrize("number", range(number_of_kills(10, 2)))
def test_a_run_of_which_one_rank_was_killed_goes_on_to_the_same_bits(
    number: int, command: list[object], whole: Path, tmp_path: Path
) -> None:
    generator = random.Random(number)  # noqa: S311 - moments of a test
    victim = (number + 1) % 2
    changes = len((whole.parent / f"{whole.name}.{victim}").read_text().splitlines())
    kill_at = generator.randint(2, changes)
    place = tmp_path / "killed"
    done = start(command, place, (0, kill_at) if victim else (kill_at, 0)).wait()
    assert done[victim].returncode == -signal.SIGKILL, (kill_at, changes)
    if victim and done[0].returncode != 0:
        assert "Error: rank 1 on " in done[0].stderr
        assert done[0].stderr.count("Error") == 1
    assert done[1].stderr == ""
    left = {name: data for name, data in snapshot(place).items() if not name.startswith("fisher.pt.partial/")}
    assert "fisher.pt" not in left or left == snapshot(whole)  # it comes last
    for rank in start([*command, "--resume"], place, (0, 0)).wait():
        assert rank.returncode == 0, (kill_at, changes, rank.stderr)
    assert snapshot(place) == snapshot(whole), (kill_at, changes)


def test_another_number_of_ranks_does_not_go_on(command: list[object], whole: Path, tmp_path: Path) -> None:
    changes = len((whole.parent / f"{whole.name}.0").read_text().splitlines())
    place = tmp_path / "killed"
    start(command, place, (changes // 2, 0)).wait()
    progress = json.loads((place / "fisher.pt.partial" / "progress.json").read_bytes())
    assert progress["fingerprint"]["number of ranks"] == "2"
    for size in (1, 3):
        first, *others = Launch(size, *command, "--resume", cwd=place).wait()
        assert first.returncode == 1
        assert (
            "left by a run with other number of ranks (2); run it with the same again" in first.stderr.splitlines()[-1]
        )
        assert all(other.stderr == "" for other in others)
    shutil.rmtree(place / "fisher.pt.partial" / "rank-1")
    first, _ = Launch(2, *command, "--resume", cwd=place).wait()
    assert "rank-1: is not that of the killed run" in first.stderr
