"""What a mask forbids does not happen, whatever the optimizer does; what it allows happens as it would without."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_maskfile import write_mask, write_subspace
from torch import Tensor, nn
from training_runs import (
    OPTIMIZERS,
    batch,
    bits,
    check_frozen,
    copies,
    learn,
    llama,
    masks,
    matrices,
    subspaces,
)

import fisherkit
from fisherkit.artefacts.mask_file import entry, header, open_mask, pack
from fisherkit.errors import CheckpointError, OptionError, TrainingError
from fisherkit.training import optimizer_hooks
from fisherkit.training.optimizer_hooks import constrain

SMALL = 1 << 12  # bytes a turn, so that the tiny model takes many


@pytest.fixture(params=["at once", "in turns"])
def turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in turns":
        monkeypatch.setattr(optimizer_hooks, "_TURN_BYTES", SMALL)
    else:
        monkeypatch.setattr(optimizer_hooks, "_steps_by_parameter", lambda optimizer, args, kwargs: False)


@pytest.mark.parametrize("kind", ["rows", "columns", "elements"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("turns")
def test_frozen_entries_keep_their_bits_under_every_optimizer(name: str, kind: str) -> None:
    model = llama()
    optimizer = OPTIMIZERS[name](model.parameters())
    learn(model, optimizer, 1)  # momentum is warm when the mask comes
    weights = matrices(model)
    before, flags = copies(weights), masks(weights, kind)
    handle = constrain(optimizer, model, flags)
    learn(model, optimizer, 3)
    check_frozen(before, weights, flags)
    handle.remove()
    learn(model, optimizer, 1)
    assert all((bits(before[name]) != bits(weights[name])).any(-1).float().mean() > 0.9 for name in weights)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("turns")
def test_entries_that_may_change_change_as_without_a_mask(name: str) -> None:
    free, held = llama(), llama()
    flags = masks(matrices(held))
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (free, held)]
    constrain(optimizers[1], held, flags)
    gradients = [torch.randn_like(p) for p in free.parameters()]
    for model, optimizer in zip((free, held), optimizers, strict=True):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for parameter, (key, other) in zip(free.parameters(), held.named_parameters(), strict=True):
        allowed = flags[key].expand(other.shape) if key in flags else torch.ones_like(other, dtype=torch.bool)
        assert torch.equal(parameter[allowed], other[allowed]), key


def test_a_step_in_turns_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for by_parameter in (True, False):
        monkeypatch.setattr(optimizer_hooks, "_TURN_BYTES", SMALL)
        if not by_parameter:
            monkeypatch.setattr(optimizer_hooks, "_steps_by_parameter", lambda optimizer, args, kwargs: False)
        model = llama()
        optimizer = torch.optim.AdamW(
            [{"params": list(model.model.parameters())}, {"params": list(model.lm_head.parameters()), "lr": 1e-4}],
            lr=1e-2,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        constrain(optimizer, model, masks(matrices(model), "elements"))
        for step in range(3):
            model(**batch(step)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert len(optimizer.param_groups) == 2
        results.append(copies(dict(model.named_parameters())))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_in_turns_no_more_is_remembered_than_a_turn_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_hooks, "_TURN_BYTES", SMALL)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = constrain(optimizer, model, masks(matrices(model), "elements"))
    held: list[int] = []
    enforce = optimizer_hooks._enforce
    monkeypatch.setattr(
        optimizer_hooks, "_enforce", lambda pairs: (held.append(sum(t.nbytes for _, t in pairs)), enforce(pairs))[1]
    )
    learn(model, optimizer, 1)
    largest = max(weight.nbytes for weight in matrices(model).values())
    assert len(held) > 3
    assert 0 < max(held) <= max(SMALL, largest)
    handle.remove()


def test_rows_are_remembered_only_where_they_are_frozen() -> None:
    model = llama()
    weights = matrices(model)
    flags = masks(weights, "rows")
    handle = constrain(torch.optim.AdamW(model.parameters()), model, flags)
    for rule in handle.rules():
        name = next(name for name, weight in weights.items() if weight is rule.parameter)
        assert rule.nbytes == int((~flags[name]).sum()) * weights[name].shape[1] * 4 == rule.remember().nbytes


def test_a_failing_step_leaves_the_optimizer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    flags = masks(matrices(model))
    constrain(optimizer, model, flags)
    learn(model, optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer_hooks, "_enforce", lambda pairs: 1 / 0)
        model(**batch()).loss.backward()
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    assert len(optimizer.param_groups) == 1
    before = copies(matrices(model))
    learn(model, optimizer, 1)
    check_frozen(before, matrices(model), flags)


def test_two_masks_on_one_optimizer_both_hold() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    weights = matrices(model)
    first, second = masks(weights, "rows", keep=0.6), masks(weights, "columns", keep=0.6, seed=1)
    before = copies(weights)
    constrain(optimizer, model, first)
    constrain(optimizer, model, second)
    learn(model, optimizer)
    check_frozen(before, weights, {name: first[name] & second[name] for name in weights})


def test_accumulated_and_clipped_gradients_make_no_difference() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    constrain(optimizer, model, flags)
    for _ in range(2):
        for micro in range(3):
            model(**batch(micro)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    check_frozen(before, weights, flags)


def test_gradient_checkpointing_and_autocast_make_no_difference() -> None:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    constrain(optimizer, model, flags)
    with torch.autocast("cpu", torch.bfloat16):
        learn(model, optimizer)
    check_frozen(before, weights, flags)


@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_bfloat16_weights_keep_their_bits(kind: str) -> None:
    model = llama().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1, weight_decay=0.1)
    weights = matrices(model)
    before, flags = copies(weights), masks(weights, kind)
    constrain(optimizer, model, flags)
    learn(model, optimizer)
    check_frozen(before, weights, flags)


def test_negative_zeros_and_nans_are_kept_too() -> None:
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight[0, 0], model.weight[1, 1] = -0.0, math.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copies({"weight": model.weight})
    flags = {"weight": torch.zeros(4, 4, dtype=torch.bool)}
    constrain(optimizer, model, flags)
    model.weight.grad = torch.ones(4, 4)
    optimizer.step()
    check_frozen(before, {"weight": model.weight}, flags)


@pytest.mark.parametrize("value", [True, False])
def test_all_and_nothing_may_change(value: bool) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weights = matrices(model)
    before = copies(weights)
    flags = {name: torch.full((weight.shape[0], 1), value) for name, weight in weights.items()}
    handle = constrain(optimizer, model, flags)
    assert len(list(handle.rules())) == (0 if value else len(weights))
    learn(model, optimizer)
    check_frozen(before, weights, flags)


def test_parameters_without_gradients_are_left_alone() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    constrain(optimizer, model, flags)
    unused = next(iter(weights))
    model(**batch()).loss.backward()
    weights[unused].grad = None
    optimizer.step()
    assert torch.equal(before[unused], weights[unused])
    check_frozen(before, weights, {name: own for name, own in flags.items() if name != unused})


def test_a_closure_is_run_and_obeys() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    constrain(optimizer, model, flags)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(**batch()).loss
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    check_frozen(before, weights, flags)


def test_a_compiled_model_obeys() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-1, weight_decay=0.1)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    before, flags = copies(weights), masks(weights)
    constrain(optimizer, compiled, flags)
    for _ in range(3):
        compiled(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    check_frozen(before, weights, flags)


def test_a_run_that_is_resumed_goes_on_as_one_that_was_not(tmp_path: Path) -> None:
    def start(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        constrain(optimizer, model, masks(matrices(model)))
        return optimizer

    whole = llama()
    optimizer = start(whole)
    learn(whole, optimizer, 1)
    torch.save([whole.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    learn(whole, optimizer, 2)
    resumed = llama()
    other = start(resumed)
    weights, state = torch.load(tmp_path / "state.pt")
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    learn(resumed, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_masks_from_files_hold_as_those_in_memory_do(tmp_path: Path) -> None:
    model = llama()
    weights = matrices(model)
    flags: dict[str, Any] = {}
    entries, tensors = {}, {}
    for number, (name, weight) in enumerate(weights.items()):
        kind = ("rows", "columns", "elements")[number % 3]
        own = masks({name: weight}, kind, seed=number)[name]
        over = {"rows": 1, "columns": 0, "elements": None}[kind]
        plain = own.numpy() if over is None else own.numpy().squeeze(over)
        entries[name] = entry(plain, tuple(weight.shape), over=over, packed=over is None)
        tensors[name] = torch.from_numpy(pack(plain) if over is None else plain)
        flags[name] = own
    path = tmp_path / "mask.safetensors"
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(header("mask", path.name, entries, direction="train")))
    loaded = fisherkit.load_mask(path)
    assert set(loaded) == set(flags)
    assert len(loaded) == len(flags)
    assert all(torch.equal(loaded[name], flags[name]) for name in flags)
    assert "absent" not in loaded
    for mask in (path, str(path), loaded, open_mask(path), dict(loaded)):
        held = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(held.parameters(), lr=1e-2, weight_decay=0.1)
        constrain(optimizer, held, mask)
        learn(held, optimizer, 2)
        check_frozen(weights, matrices(held), flags)


# Subspaces


def share_inside(change: Tensor, u: Tensor | None, v: Tensor | None) -> float:
    """The norm of what lies in the protected directions over that of the whole change, in float64."""
    change = change.double()
    inside = [u.double().mT @ change] if u is not None else []
    inside += [change @ v.double()] if v is not None else []
    return max(float(part.norm() / change.norm()) for part in inside)


@pytest.mark.parametrize("sides", ["UV", "U", "V"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd-momentum", "unknown"])
@pytest.mark.usefixtures("turns")
def test_an_update_stays_out_of_the_protected_directions(name: str, sides: str) -> None:
    model = llama()
    optimizer = OPTIMIZERS[name](model.parameters())
    learn(model, optimizer, 1)
    weights = matrices(model)
    before, parts = copies(weights), subspaces(weights, sides=sides)
    constrain(optimizer, model, parts)
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


# What is refused


def refused(mask: Any, model: nn.Module | None = None, optimizer: Any = None, **options: Any) -> None:
    model = model if model is not None else llama()
    constrain(optimizer or torch.optim.AdamW(model.parameters()), model, mask, **options)


def test_a_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"1 of 2 weights are not in this model, the first 'model.layers.9"):
        refused({name: torch.ones(48, 1, dtype=torch.bool), "model.layers.9.x.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match=r"a mask of \[47, 1\] does not fit a weight of \[48, 32\]"):
        refused({name: torch.ones(47, 1, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match=r"6 of 6 weights are not in this model"):
        refused(write_mask(tmp_path / "m.safetensors"))
    with pytest.raises(CheckpointError, match=rf"the modes of {name} do not fit a weight of \[48, 32\]"):
        refused({f"{name}.U": torch.eye(32)})
    with pytest.raises(CheckpointError, match="speaks of layer 3, and this model has 3 layers"):
        refused([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": torch.ones(3)}, "'w' of the mask is no bool tensor"),
        ({"w": torch.ones(3, dtype=torch.uint8)}, "'w' of the mask is no bool tensor"),
        ({}, "not a layer importance"),
        ([], "not a layer importance"),
        ({"0": "x"}, "not a layer importance"),
        ([1.0, math.nan, 2.0], "layer 1 has the importance nan"),
        ([1.0, -1.0, 2.0], "layer 1 has the importance -1.0"),
        (Path("absent.safetensors"), "no such file"),
        (Path("absent.json"), "no such file"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        refused(mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parity": "papers"}, "parity must be None or 'paper', not 'papers'"),
        ({"power": -1}, "power of a layer's scale must be 0 or more"),
        ({"floor": 1.5}, "floor of a layer's scale must be between 0 and 1"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        refused([1.0, 2.0, 3.0], **options)


def test_an_optimizer_that_keeps_copies_of_its_own_is_refused() -> None:
    model = llama()
    copied = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in model.parameters()])
    with pytest.raises(TrainingError, match="the optimizer trains none of its 21 weights"):
        refused(masks(matrices(model)), model, copied)
    with pytest.raises(TrainingError, match="the optimizer trains no parameter of any layer"):
        refused([1.0, 2.0, 3.0], model, copied)
    with pytest.raises(TrainingError, match="str is no torch optimizer"):
        refused(masks(matrices(model)), model, "adamw")


def test_deepspeed_and_fsdp1_are_refused_with_what_to_do_instead() -> None:
    model = llama()
    flags = masks(matrices(model))
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = model
    fsdp = type("FullyShardedDataParallel", (nn.Module,), {"__module__": "torch.distributed.fsdp.fully_sharded"})()
    fsdp.module = model
    wrapper = type("DeepSpeedOptimizerWrapper", (torch.optim.AdamW,), {"__module__": "accelerate.utils.deepspeed"})
    with pytest.raises(TrainingError, match=r"DeepSpeed keeps weights of its own.*train with FSDP2"):
        refused(flags, engine)
    with pytest.raises(TrainingError, match=r"DeepSpeed keeps weights of its own"):
        refused(flags, model, wrapper(model.parameters()))
    with pytest.raises(TrainingError, match=r"FSDP1 trains flat pieces.*use FSDP2"):
        refused(flags, fsdp)
    next(model.parameters()).ds_id = 0
    with pytest.raises(TrainingError, match="DeepSpeed"):
        refused(flags, model)


def test_a_subspace_is_no_mapping_of_masks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a subspace, not a mask"):
        fisherkit.load_mask(write_subspace(tmp_path / "s.safetensors"))


def test_the_package_imports_no_torch_before_it_is_used() -> None:
    code = "import sys, fisherkit.training; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_oracle_of_bits_sees_a_sign_of_zero() -> None:
    assert (bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))).any()
    assert np.signbit(-0.0)
