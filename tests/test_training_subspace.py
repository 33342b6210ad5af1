"""Updates stay out of protected directions and keep to the scales of their layers; the published ways do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_files import write_subspace
from torch import Tensor, nn
from training_runs import (
    OPTIMIZERS,
    copies,
    learn,
    llama,
    masks,
    matrices,
    subspaces,
)

from fisherkit.artefacts.mask_file import open_mask
from fisherkit.training.optimizer_hooks import constrain

TURN_BYTES = 1 << 12  # so that the tiny model takes many turns

# Subspaces


def share_inside(change: Tensor, u: Tensor | None, v: Tensor | None) -> float:
    """The norm of what lies in the protected directions over that of the whole change, in float64."""
    change = change.double()
    inside = [u.double().mT @ change] if u is not None else []
    inside += [change @ v.double()] if v is not None else []
    return max(float(part.norm() / change.norm()) for part in inside)


@pytest.mark.parametrize("sides", ["UV", "U", "V"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd-momentum", "unknown"])
def test_an_update_stays_out_of_the_protected_directions(name: str, sides: str, turns: int | None) -> None:
    model = llama()
    optimizer = OPTIMIZERS[name](model.parameters())
    learn(model, optimizer, 1)
    weights = matrices(model)
    before, parts = copies(weights), subspaces(weights, sides=sides)
    constrain(optimizer, model, parts).turn_bytes = turns
    learn(model, optimizer, 5)
    for key, weight in weights.items():
        change = weight.detach() - before[key]
        assert change.norm() > 0
        assert share_inside(change, parts.get(f"{key}.U"), parts.get(f"{key}.V")) < 1e-6


def test_a_projected_update_is_the_free_one_less_what_is_protected() -> None:
    weight = nn.Linear(6, 5, bias=False)
    u, v = subspaces({"w": weight.weight}, 2).values()
    before = weight.weight.detach().double()
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.5)
    constrain(optimizer, weight, {"weight.U": u, "weight.V": v})
    gradient = torch.randn(5, 6)
    weight.weight.grad = gradient
    optimizer.step()
    left = torch.eye(5, dtype=torch.float64) - u.double() @ u.double().T
    right = torch.eye(6, dtype=torch.float64) - v.double() @ v.double().T
    wanted = before + left @ (-0.5 * gradient.double()) @ right
    assert torch.allclose(weight.weight.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_puts_back_does_not_add_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30, bias=False).to(dtype)
    parts = subspaces({"weight": model.weight})
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    constrain(optimizer, model, parts)
    for _ in range(200):
        model.weight.grad = torch.randn(30, 40).to(dtype) + 1
        optimizer.step()
    after = model.weight.detach().double()
    leak = (parts["weight.U"].double().mT @ (after - before.double())).norm() / after.norm()
    assert leak < 0.2 * torch.finfo(dtype).eps  # one rounding, not the sum of 200


def test_in_bfloat16_a_small_learning_rate_stays_out_of_a_subspace_and_at_its_scale() -> None:
    """Updates far below the spacing of bfloat16, most of which rounding takes away again."""
    shares, moved = {}, {}
    for kind in ("free", "subspace", "scale"):
        torch.manual_seed(1)
        model = nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(64, 64, bias=False)}) for _ in range(3)])}
        )
        model = model.to(torch.bfloat16)
        weight = model["layers"][2]["proj"].weight
        parts = subspaces({"layers.2.proj.weight": weight})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        before = weight.detach().double()
        if kind != "free":
            constrain(optimizer, model, parts if kind == "subspace" else [1.0, 1.0, 100.0])
        gradients = torch.Generator().manual_seed(2)
        for _ in range(100):
            for parameter in model.parameters():
                parameter.grad = torch.randn(64, 64, generator=gradients).bfloat16() + 0.5
            optimizer.step()
        change = weight.detach().double() - before
        shares[kind] = float((parts["layers.2.proj.weight.U"].double().mT @ change).norm() / change.norm())
        moved[kind] = float(change.norm())
    assert shares["subspace"] < 0.1 < shares["free"]
    assert moved["scale"] == pytest.approx(0.1 * moved["free"], rel=0.35)


def test_a_subspace_file_holds(tmp_path: Path) -> None:
    path = write_subspace(tmp_path / "s.safetensors", shape=(5, 6))
    model = nn.ParameterDict({"w": torch.randn(5, 6)})
    before = model["w"].detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    constrain(optimizer, model, path)
    for _ in range(3):
        model["w"].grad = torch.randn(5, 6)
        optimizer.step()
    modes = open_mask(path).modes("w")
    assert modes.u is not None
    assert modes.v is not None
    assert share_inside(model["w"].detach() - before, torch.from_numpy(modes.u), torch.from_numpy(modes.v)) < 1e-6


# Layer scales


def test_a_scaled_layer_moves_by_exactly_its_scale() -> None:
    importance = [1.0, 4.0, 400.0]  # median 4: scales 1, 1 and 0.1
    free, held = llama(), llama()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (free, held)]
    constrain(optimizers[1], held, importance)
    start = copies(dict(free.named_parameters()))
    gradients = {name: torch.randn_like(p) for name, p in free.named_parameters()}
    for model, optimizer in zip((free, held), optimizers, strict=True):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
    others = dict(held.named_parameters())
    for name, parameter in free.named_parameters():
        moved = parameter.detach().double() - start[name].double()
        factor = 0.1 if ".layers.2." in name else 1.0
        wanted = (start[name].double() + factor * moved).float()
        assert torch.allclose(others[name], wanted, rtol=0, atol=6e-8 * float(wanted.abs().max())), name
        assert factor != 1 or torch.equal(others[name], parameter)


@pytest.mark.parametrize("form", ["path", "dict", "plain"])
def test_importance_is_taken_in_each_of_its_forms(form: str, tmp_path: Path) -> None:
    rows = {"layers": [{"layer": n, "mean": mean, "sum": 1.0} for n, mean in enumerate((1.0, 4.0, 16.0))]}
    (tmp_path / "layer_importance.json").write_text(json.dumps(rows))
    mask: Any = {"path": tmp_path / "layer_importance.json", "dict": rows, "plain": {"0": 1.0, "1": 4.0, "2": 16.0}}
    model = llama()
    handle = constrain(torch.optim.AdamW(model.parameters()), model, mask[form], power=1, floor=0.0)
    scaled = {rule.parameter for rule in handle.rules()}
    assert scaled == {p for name, p in model.named_parameters() if ".layers.2." in name}
    assert {rule._factor for rule in handle.rules()} == {0.25}  # type: ignore[attr-defined]


# The published way


def test_gradient_masks_let_frozen_weights_move_under_weight_decay_and_not_without() -> None:
    drift = {}
    for decay in (0.0, 0.1):
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
        weights = matrices(model)
        before, flags = copies(weights), masks(weights)
        constrain(optimizer, model, flags, parity="paper")
        learn(model, optimizer)
        drift[decay] = max(
            float((weight.detach() - before[name])[~flags[name].expand_as(weight)].abs().max())
            for name, weight in weights.items()
        )
    assert drift[0.0] == 0
    assert drift[0.1] > 1e-5


def test_gradient_masks_are_the_gradient_times_the_mask() -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights = matrices(model)
    before, flags = copies(weights), masks(weights, "elements")
    constrain(optimizer, model, flags, parity="paper")
    gradients = {name: torch.randn_like(weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.grad = gradients[name].clone()
    optimizer.step()
    assert all(torch.equal(w, before[n] - gradients[n] * flags[n]) for n, w in weights.items())


def test_projected_gradients_leak_under_adamw_and_scaled_ones_do_nothing() -> None:
    model = llama()
    weights = matrices(model)
    before, parts = copies(weights), subspaces(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, parts, parity="paper")
    learn(model, optimizer, 2)
    name = next(iter(weights))
    assert share_inside(weights[name].detach() - before[name], parts[f"{name}.U"], parts[f"{name}.V"]) > 1e-2

    changes = []
    for importance in ([1.0, 1.0, 1.0], [1.0, 1.0, 100.0]):
        model = llama()
        start = copies(matrices(model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        constrain(optimizer, model, importance, parity="paper")
        learn(model, optimizer, 1)
        name = "model.layers.2.mlp.up_proj.weight"
        changes.append(float((matrices(model)[name].detach() - start[name]).norm()))
    assert changes[1] == pytest.approx(changes[0], rel=1e-2)
