"""FGGM in several processes: they measure and train together, and what a mask freezes stays as it is in all of them."""

import json
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path

import fork_server
import pairs
import pytest
import torch
from training_runs import check_frozen

import fisherkit

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
Checkpoint = Callable[[str], Path]
WORKER = Path(__file__).parent / "support" / "fggm_worker.py"
LINES = {
    "rivers": ["Name three rivers.", "What is two plus two?", "No! Three rivers."],
    "capitals": ["What is the capital?", "Good morning to you all.", "Yes. No!"],
}


def train(kind: str, size: int, model: Path, folder: Path) -> Path:
    """Train both tasks, the second one interrupted and gone on with; ``size`` rows a step."""
    prompts = []
    for name, lines in LINES.items():
        prompts.append(folder / f"{name}.jsonl")
        rows = [{"prompt": line[:9], "completion": line[9:]} for line in lines]
        prompts[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / "run"
    done = fork_server.run([str(WORKER), kind, str(size), str(model), str(out), str(port), *map(str, prompts)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all held\n")
    return out


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """What one process trains, by the number of rows that it takes at a step."""
    return cache(lambda size: train("alone", size, checkpoint("llama"), tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("transformers", 2), ("accelerate", 3)])
def test_frozen_entries_stay_as_they_are_on_every_rank(
    kind: str, size: int, alone: Callable[[int], Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    together = train(kind, size, model, tmp_path)
    before = pairs.tensors(model)
    for number, name in enumerate(LINES):
        ours, theirs = (folder / f"{number:02d}-{name}" for folder in (together, alone(size)))
        after, flags = pairs.tensors(ours / "model"), dict(fisherkit.load_mask(ours / "mask.safetensors"))
        check_frozen(before, after, flags)
        assert json.loads((ours / "fisher.json").read_bytes())["run"]["ranks"] == size
        other = fisherkit.load_mask(theirs / "mask.safetensors")
        assert all(torch.equal(own, other[key]) for key, own in flags.items())
        for key, wanted in pairs.tensors(theirs / "model").items():
            torch.testing.assert_close(after[key], wanted, rtol=0, atol=1e-4)
        before = after
