"""Rules hold a training run on a device as they do on the CPU, and a step copies nothing between the two."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pretend
import pull_oracle
import pytest
import tiny
import torch
from torch import Tensor, nn
from training_runs import OPTIMIZERS, batch, llama, masks, matrices, subspaces

import fisherkit
from fisherkit.options import ScoreOptions
from fisherkit.training import constrain

Checkpoint = Callable[[str], Path]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with pretend.plugged_in(monkeypatch):
        yield pretend.DEVICE


def rule(kind: str, model: nn.Module, folder: Path) -> Any:
    weights = matrices(model)
    if kind in ("rows", "elements"):
        return masks(weights, kind)
    if kind == "subspace":
        return subspaces(weights)
    if kind == "pull":
        pull_oracle.write(folder / "soft.safetensors", weights)
        return folder / "soft.safetensors"
    return [1.0, 2.0, 8.0]


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = batch(seed)
    on = next(model.parameters()).device
    model(
        **{name: value if on.type == "cpu" else pretend.to_pretend(value) for name, value in inputs.items()}
    ).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "unknown"])
@pytest.mark.parametrize("kind", ["rows", "elements", "subspace", "pull", "scale"])
def test_a_rule_on_a_device_moves_weights_as_on_the_cpu(kind: str, name: str, tmp_path: Path, device: Any) -> None:
    weights: list[dict[str, Tensor]] = []
    for on_device in (False, True):
        model = llama()
        mask = rule(kind, model, tmp_path)
        if on_device:
            pretend.move(model)
        optimizer = OPTIMIZERS[name](model.parameters())
        constrain(optimizer, model, mask, pull=0.2 if kind == "pull" else None, steps=1)
        step(model, optimizer, 0)  # masks and directions go to the device with the first step
        with pretend.watching() as traffic:
            for seed in (1, 2):
                step(model, optimizer, seed)
        ours = [line for line in (*traffic.copies, *traffic.syncs) if line != "?"]
        assert not ours
        weights.append({key: pretend.to_host(value.detach()) for key, value in matrices(model).items()})
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=2e-5, msg=key)


def test_scores_on_a_device_are_those_on_the_cpu(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, device: torch.device
) -> None:
    models = [checkpoint("llama"), tiny.save("llama", tmp_path / "other", seed=1)]
    options = {"group_size": 2, "batch_tokens": 40, "dtype": "float32"}
    with pretend.watching() as traffic:
        found = list(fisherkit.score(models, prompts, ScoreOptions(**options)).records())
    wanted = list(fisherkit.score(models, prompts, ScoreOptions(device="cpu", **options)).records())
    assert traffic.launches.total() > 100
    for one, other in zip(found, wanted, strict=True):
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
