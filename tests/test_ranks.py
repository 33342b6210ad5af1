"""Several processes measure what one measures: the sum over the samples does not care who holds which of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fork_server
import pytest
import safetensors.torch
import torch
from torch import Tensor

import fisherkit

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
Checkpoint = Callable[[str], Path]
WORKER = Path(__file__).parent / "support" / "ranks_worker.py"
CALLS: dict[str, dict[str, Any]] = {
    "llama": {"batch_tokens": 20, "group_size": 2},
    "gemma4-e2b": {"targets": "all", "group_size": 2},
    "qwen3-moe": {"group_size": 1, "labels": "sampled", "seed": 3},
    "llama-tied": {"engine": "resident", "targets": "all"},
    "gpt2": {"statistics": "inputs", "group_size": 1},
}
SIZES = {"llama": (2, 3), "gemma4-e2b": (2, 4), "qwen3-moe": (2, 7), "llama-tied": (2, 7), "gpt2": (3, 7)}
"""Numbers of ranks that measure each; 7 are more than there are samples."""


def together(size: int, calls: list[dict[str, Any]], folder: Path, **env: str) -> fork_server.Done:
    store = folder / f"store-{size}"
    return fork_server.run([str(WORKER), str(size), str(store), json.dumps(calls)], env=env)


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path) if path.suffix == ".pt" else safetensors.torch.load_file(path)


def assert_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        error = (value.double() - wanted[name].double()).norm() / wanted[name].double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{what} {name}: {error:.1e}"


def calls_of(checkpoint: Checkpoint, prompts: Path, folder: Path, size: int | None = None) -> list[dict[str, Any]]:
    folder.mkdir()
    return [
        {
            "model": str(checkpoint(name)),
            "prompts": str(prompts),
            "out": str(folder / f"{name}{'.pt' if name == 'llama' else '.safetensors'}"),
            "options": {"store": "fp32", "statistics": "activations" if name == "llama" else "fisher"} | options,
        }
        for name, options in CALLS.items()
        if size is None or size in SIZES[name]
    ]


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process measures, with one thread as each rank has."""
    folder = tmp_path_factory.mktemp("alone")
    done = together(1, calls_of(checkpoint, prompts, folder / "out"), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out"


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_ranks_together_measure_what_one_process_measures(
    size: int, alone: Path, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    calls = calls_of(checkpoint, prompts, tmp_path / "out", size)
    done = together(size, calls, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for call in calls:
        path = Path(call["out"])
        assert_close(load(path), load(alone / path.name), 1e-6, path.name)
        ours, theirs = (json.loads(file.with_suffix(".json").read_bytes()) for file in (path, alone / path.name))
        assert ours["run"].pop("ranks") == size
        assert ours["run"].pop("machines") == 1
        if "loss" in theirs:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours.get("tensors", {}).keys() == theirs.get("tensors", {}).keys()
        for name, figures in theirs.get("tensors", {}).items():
            assert ours["tensors"][name]["sum"] == pytest.approx(figures["sum"], rel=1e-5), name
        if "tensors" in ours:
            assert fisherkit.inspect(path).notes == ()
        for made in (ours, theirs):
            for key in ("created", "loss", "tensors", "histogram", "content_sha256", "moments"):
                made.pop(key, None)
            for key in ("fingerprint", "seconds"):
                made["run"].pop(key)
        assert ours == theirs


def test_ranks_that_share_no_file_system_send_what_they_cannot_write(
    alone: Path, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    calls = calls_of(checkpoint, prompts, tmp_path / "out", 3)
    done = together(3, calls, tmp_path, FISHERKIT_TEST_APART="2")
    assert done.returncode == 0, done.stderr[-3000:]
    for call in calls:
        path = Path(call["out"])
        assert_close(load(path), load(alone / path.name), 1e-6, path.name)
        assert json.loads(path.with_suffix(".json").read_bytes())["run"]["machines"] == 2
        assert not path.with_name(f"{path.name}.partial").exists()
