"""Ranks as a launcher starts them: only the first one speaks, and one that fails ends all others with one line."""

import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks_launch import Launch

from fisherkit.engine.ranks import start
from fisherkit.engine.ranks.places import Place, local_device, take_local_gpu
from fisherkit.errors import OptionError

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
Checkpoint = Callable[[str], Path]


def words(checkpoint: Checkpoint, prompts: Path, *more: str) -> list[object]:
    return [
        "extract",
        checkpoint("llama"),
        prompts,
        "-o",
        "fisher.pt",
        "--group-size",
        "1",
        "--batch-tokens",
        "20",
        *more,
    ]


def one_line(launch: Launch, failed: int) -> str:
    """The error that rank 0 alone says."""
    done = launch.wait()
    assert [rank.stdout for rank in done] == [""] * len(done)
    assert all(rank.returncode != 0 for rank in done), done
    assert [rank.stderr for rank in done[1:]] == [""] * (len(done) - 1), done
    error = [line for line in done[0].stderr.splitlines() if line.startswith("Error")]
    assert len(error) == 1, done[0].stderr
    assert "Traceback" not in done[0].stderr
    if failed:
        assert error[0].startswith(f"Error: rank {failed} on {socket.gethostname()}: "), error
    return error[0]


def test_only_the_first_rank_speaks(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    first, second = Launch(2, *words(checkpoint, prompts), cwd=tmp_path).wait()
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert first.stdout == "fisher.pt\n"
    assert first.stderr.count("3 groups of 1 layer") == 1
    assert (second.stdout, second.stderr) == ("", "")
    assert json.loads((tmp_path / "fisher.json").read_bytes())["run"]["ranks"] == 2
    assert not (tmp_path / "fisher.pt.partial").exists()
    again, silent = Launch(2, *words(checkpoint, prompts), cwd=tmp_path).wait()
    assert again.returncode == silent.returncode == 1
    assert [line for line in again.stderr.splitlines() if "Error" in line] == [
        "Error: fisher.pt: exists already; choose another name, or --force to replace it"
    ]
    assert (silent.stdout, silent.stderr) == ("", "")


def test_one_process_under_torchrun_is_a_group_of_one(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = Launch(1, *words(checkpoint, prompts), cwd=tmp_path).wait()
    assert plain.returncode == 0, plain.stderr
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    (tmp_path / "ranks").mkdir()
    (one,) = Launch(1, *words(checkpoint, prompts), cwd=tmp_path / "ranks").wait()
    assert one.returncode == 0, one.stderr
    assert (tmp_path / "ranks" / "fisher.pt").read_bytes() == (tmp_path / "fisher.pt").read_bytes()
    assert json.loads((tmp_path / "ranks" / "fisher.json").read_bytes())["run"]["ranks"] == 1
    assert "ranks" not in json.loads((tmp_path / "fisher.json").read_bytes())["run"]


def test_ranks_on_devices_of_several_kinds_are_refused_by_all() -> None:
    places = [Place(f"node{rank}", "", rank) for rank in range(3)]
    start.refuse_other_kinds(places, ["cuda", "cuda", "cuda"])
    with pytest.raises(OptionError, match=r"^rank 0 on node0 computes on cuda, rank 2 on node2 on cpu; .*--device$"):
        start.refuse_other_kinds(places, ["cuda", "cuda", "cpu"])


@pytest.mark.parametrize(
    ("wanted", "rank", "gpus", "taken"),
    [("auto", "3", 8, 3), ("cuda", "3", 1, 0), ("cuda:1", "3", 8, None), ("auto", "", 8, None), ("cpu", "3", 8, None)],
)
def test_every_rank_takes_its_own_gpu_before_anything_is_put_on_the_first(
    wanted: str, rank: str, gpus: int, taken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[object] = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    take_local_gpu(wanted)
    assert chosen == ([] if taken is None else [taken])
    chosen.clear()
    found = local_device(torch.device("cuda", 1), 5)
    assert found == torch.device("cuda", 1 if rank else 5)  # a launcher's number, or that among the neighbours
    assert chosen == [found]
    assert local_device(torch.device("cpu"), 5) == torch.device("cpu")


def test_a_rank_that_cannot_read_a_shard_ends_all(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    broken = (
        "from fisherkit.checkpoint import torch_reader as t; from fisherkit.errors import CheckpointError\n"
        "def fail(self, part): raise CheckpointError(f'{part[0].file.name}: cannot be read: Input/output error')\n"
        "t.Reader._missing = fail\n0"
    )
    began = time.monotonic()
    launch = Launch(3, *words(checkpoint, prompts), first={1: broken}, cwd=tmp_path)
    assert one_line(launch, 1).endswith("cannot be read: Input/output error")
    assert time.monotonic() - began < 60
    assert not (tmp_path / "fisher.pt").exists()


def test_a_full_disk_on_one_rank_ends_all_and_can_be_resumed(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))"
    launch = Launch(2, *words(checkpoint, prompts), first={1: full}, cwd=tmp_path)
    assert "disk full while writing" in one_line(launch, 1)
    assert not (tmp_path / "fisher.pt").exists()
    first, _ = Launch(2, *words(checkpoint, prompts, "--resume"), cwd=tmp_path).wait()
    assert first.returncode == 0, first.stderr


def test_ctrl_c_ends_all(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    launch = Launch(2, *words(checkpoint, prompts), cwd=tmp_path, first=dict.fromkeys(range(2), SLOW))
    launch.wait_until_said(0, "forward")
    for number in range(2):
        launch.kill(number, signal.SIGINT)
    first, second = launch.wait()
    assert (first.returncode, second.returncode) == (130, 130), first.stderr
    assert first.stderr.splitlines()[-1].startswith("Interrupted. What is finished is in fisher.pt.partial")
    assert (second.stdout, second.stderr) == ("", "")


SLOW = (
    "import time; from fisherkit.engine.sweep.job import Job\n"
    "plain = Job.lengths\n"
    "def slow(self, batch): time.sleep(0.05); return plain(self, batch)\n"
    "Job.lengths = slow\n0"
)
