"""On an NVIDIA GPU: results are those of the CPU, and nothing in a loop over batches waits. ``-m cuda`` runs these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import training_runs
from torch import Tensor

import fisherkit
from fisherkit.engine.model import copies
from fisherkit.engine.sweep import sweep
from fisherkit.kernels import fisher as kernels
from fisherkit.kernels import fused
from fisherkit.methods.extract.prepare import Prepared
from fisherkit.options import ExtractOptions
from fisherkit.training import constrain

Checkpoint = Callable[[str], Path]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # of drivers and compilers
]


def extract(model: Path, prompts: Path, out: Path, device: str, **changes: Any) -> dict[str, Tensor]:
    options = {"store": "fp32", "batch_tokens": 40, "group_size": 1, "force": True, **changes}
    fisherkit.extract(model, prompts, out, ExtractOptions(device=device, **options))
    found: dict[str, Tensor] = torch.load(out)
    return found


@pytest.mark.parametrize("keep", [True, False], ids=["weights stay", "weights come and go"])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"labels": "sampled"}),
        ("llama-tied", {"targets": "all"}),
        ("llama", {"engine": "resident"}),
        ("gemma4-e2b", {}),
        ("qwen3-moe", {}),
        ("gpt2", {"targets": "all"}),
    ],
)
def test_fisher_is_that_of_the_cpu(
    architecture: str,
    changes: dict[str, Any],
    keep: bool,
    checkpoint: Checkpoint,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Prepared, "weights_fit", lambda prepared: keep)
    found = extract(checkpoint(architecture), prompts, tmp_path / "found.pt", "cuda", **changes)
    wanted = extract(checkpoint(architecture), prompts, tmp_path / "wanted.pt", "cpu", **changes)
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= 2e-3 * float(value.norm()) + 1e-12, name


def test_activations_are_those_of_the_cpu(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        extract(checkpoint("llama"), prompts, tmp_path / f"{device}.pt", device, statistics="activations")
    found, wanted = (
        safetensors.torch.load_file(tmp_path / f"{device}.activations.safetensors") for device in ("cuda", "cpu")
    )
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= 1e-3 * float(value.norm()), name


def test_no_replay_of_a_batch_waits_for_the_device(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = sweep.Sweep._replay

    def watched(self: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == self.top:  # transformers looks at the positions for every head
            return replay(self, number, *args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return replay(self, number, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    extract(checkpoint("llama"), prompts, tmp_path / "warm.pt", "cuda")  # kernels are chosen, memory is pinned
    monkeypatch.setattr(sweep.Sweep, "_replay", watched)
    extract(checkpoint("llama"), prompts, tmp_path / "a.pt", "cuda")


def test_sent_weights_survive_a_busy_device() -> None:
    device = torch.device("cuda", 0)
    sender = copies.Sender(device, staging_bytes=1 << 16)
    busy = torch.randn(2048, 2048, device=device)
    for turn in range(20):
        tensors = {str(n): torch.full((257, 129), float(turn * 10 + n)) for n in range(5)}
        sent = sender.send(tensors)
        for _ in range(5):
            busy = busy @ busy
            busy = busy / busy.norm()
        received = sent.receive()
        copy = copies.to_host([value * 2 for value in received.values()])
        del received, sent
        for value, (name, tensor) in zip(copy.wait(), tensors.items(), strict=True):
            assert torch.equal(value, 2 * tensor), name


@pytest.mark.parametrize("sizes", [(700, 1030), (704, 1032)], ids=["odd rows", "rows of whole 16 bytes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_kernel_gives_the_formula(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    device = torch.device("cuda", 0)
    if not fused.works(kernels.add_squared_tiles_, device):
        pytest.skip("triton is not installed")
    from fisherkit.kernels.triton_fisher import TILES

    generator = torch.Generator().manual_seed(0)
    lengths = (3, 1, 300, 64)
    inputs = [torch.randn(n, sizes[0], generator=generator).to(dtype) for n in lengths]
    grads = [torch.randn(n, sizes[1], generator=generator).to(dtype) for n in lengths]
    wanted = sum((g.double().T @ x.double()) ** 2 for g, x in zip(grads, inputs, strict=True))
    moved = [x.to(device) for x in inputs], [g.to(device) for g in grads]
    for tile in TILES:
        try:
            found = torch.zeros(*sizes, device=device).T
            fused.add_fused_(found, *moved, tile)
        except Exception as error:
            if "OutOfResources" not in type(error).__name__:
                raise
            continue
        assert float((found.cpu() - wanted).norm() / wanted.norm()) < 1e-5, tile


@pytest.mark.parametrize("rule", ["rows", "entries"])
def test_a_rule_holds_on_the_device(rule: str) -> None:
    model = training_runs.llama().cuda()
    name, weight = next((n, p) for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n)
    mask = torch.rand(weight.shape[0], 1 if rule == "rows" else weight.shape[1]) < 0.5
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    handle = constrain(optimizer, model, {name: mask})
    for seed in range(3):
        model(**{key: value.cuda() for key, value in training_runs.batch(seed).items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    moved = (weight.detach() != before).cpu()
    assert not (moved & ~mask.expand_as(moved)).any()
    assert moved.any()
