"""FGGM in several processes: they measure and train together, and what a mask freezes stays as it is in all of them."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import fork_server
import pairs
import pytest
import torch
from training_runs import check_frozen

import fisherkit

pytest.importorskip("accelerate")
WORKER = Path(__file__).parent / "support" / "fggm_worker.py"
LINES = {
    "rivers": ["Name three rivers.", "What is two plus two?", "No! Three rivers."],
    "capitals": ["What is the capital?", "Good morning to you all.", "Yes. No!"],
}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_frozen_entries_stay_as_they_are_on_every_rank(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    paths = []
    for name, lines in LINES.items():
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"prompt": line[:9], "completion": line[9:]}) + "\n" for line in lines))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model, out = checkpoint("llama"), tmp_path / "run"
    done = fork_server.run([str(WORKER), str(model), str(out), str(port), *map(str, paths)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all held\n")
    before = pairs.tensors(model)
    for number, name in enumerate(LINES):
        folder = out / f"{number:02d}-{name}"
        after, flags = pairs.tensors(folder / "model"), dict(fisherkit.load_mask(folder / "mask.safetensors"))
        check_frozen(before, after, flags)
        assert json.loads((folder / "fisher.json").read_bytes())["run"]["ranks"] == 2
        before = after
