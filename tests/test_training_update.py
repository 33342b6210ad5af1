"""What a mask forbids does not happen, whatever the optimizer does; what it allows happens as it would without."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
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
)

import fisherkit
from fisherkit.artefacts.mask_file import entry, header, open_mask, pack
from fisherkit.training import optimizer_hooks
from fisherkit.training.optimizer_hooks import constrain

TURN_BYTES = 1 << 12  # bytes a turn, so that the tiny model takes many


@pytest.mark.parametrize("kind", ["rows", "columns", "elements"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_entries_keep_their_bits_under_every_optimizer(name: str, kind: str, turns: int | None) -> None:
    model = llama()
    optimizer = OPTIMIZERS[name](model.parameters())
    learn(model, optimizer, 1)  # momentum is warm when the mask comes
    weights = matrices(model)
    before, flags = copies(weights), masks(weights, kind)
    handle = constrain(optimizer, model, flags)
    handle.turn_bytes = turns
    learn(model, optimizer, 3)
    check_frozen(before, weights, flags)
    handle.remove()
    learn(model, optimizer, 1)
    assert all((bits(before[name]) != bits(weights[name])).any(-1).float().mean() > 0.9 for name in weights)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_entries_that_may_change_change_as_without_a_mask(name: str, turns: int | None) -> None:
    free, held = llama(), llama()
    flags = masks(matrices(held))
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (free, held)]
    constrain(optimizers[1], held, flags).turn_bytes = turns
    gradients = [torch.randn_like(p) for p in free.parameters()]
    for model, optimizer in zip((free, held), optimizers, strict=True):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for parameter, (key, other) in zip(free.parameters(), held.named_parameters(), strict=True):
        allowed = flags[key].expand(other.shape) if key in flags else torch.ones_like(other, dtype=torch.bool)
        assert torch.equal(parameter[allowed], other[allowed]), key


def test_a_step_in_turns_is_the_same_step() -> None:
    results = []
    for turn_bytes in (TURN_BYTES, None):
        model = llama()
        optimizer = torch.optim.AdamW(
            [{"params": list(model.model.parameters())}, {"params": list(model.lm_head.parameters()), "lr": 1e-4}],
            lr=1e-2,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        constrain(optimizer, model, masks(matrices(model), "elements")).turn_bytes = turn_bytes
        for step in range(3):
            model(**batch(step)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert len(optimizer.param_groups) == 2
        results.append(copies(dict(model.named_parameters())))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_in_turns_no_more_is_remembered_than_a_turn_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = constrain(optimizer, model, masks(matrices(model), "elements"))
    handle.turn_bytes = TURN_BYTES
    held: list[int] = []
    enforce = optimizer_hooks._enforce
    monkeypatch.setattr(
        optimizer_hooks, "_enforce", lambda pairs: (held.append(sum(t.nbytes for _, t in pairs)), enforce(pairs))[1]
    )
    learn(model, optimizer, 1)
    largest = max(weight.nbytes for weight in matrices(model).values())
    assert len(held) > 3
    assert 0 < max(held) <= max(TURN_BYTES, largest)
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


# What is refused


def test_the_oracle_of_bits_sees_a_sign_of_zero() -> None:
    assert (bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))).any()
    assert np.signbit(-0.0)
