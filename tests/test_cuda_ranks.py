"""Ranks on an NVIDIA GPU: one over NCCL, and two that share it, which go over gloo. ``-m cuda`` runs these."""

import json
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest
import torch

Checkpoint = Callable[[str], Path]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="this torch has no NCCL"),
]
FEW = ("--device", "cuda:0", "--group-size", "1", "--batch-tokens", "20", "--store", "fp32")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_ranks_on_a_gpu_measure_what_one_process_measures(
    architecture: str, size: int, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    words = ("-m", "fisherkit", "extract", str(checkpoint(architecture)), str(prompts), *FEW)
    if architecture == "llama":
        words = (*words, "--statistics", "activations")
    plain = fork_server.run([*words, "-o", "plain.pt"], cwd=tmp_path, fresh=True, timeout=120)
    assert plain.returncode == 0, plain.stderr
    log = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(tmp_path / "nccl.%p.log")}
    launched = [*TORCHRUN, str(size), *words, "-o", "ranks.pt"]
    done = fork_server.run(launched, cwd=tmp_path, env=log, fresh=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logs = [path.read_text() for path in tmp_path.glob("nccl.*.log")]
    if size == 1:
        assert any("Init COMPLETE" in text for text in logs), done.stderr
    else:
        assert not any("Init COMPLETE" in text for text in logs)
        assert done.stderr.count("some ranks share a GPU") == 1
    found, wanted = (torch.load(tmp_path / name) for name in ("ranks.pt", "plain.pt"))
    assert json.loads((tmp_path / "ranks.json").read_bytes())["run"]["ranks"] == size
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = float((found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30))
        assert error <= (1e-6 if size == 1 else 1e-4), (name, error)
