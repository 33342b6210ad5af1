"""LoRA under a subspace: the product of the factors stays out of it, whatever the layout of the weight."""

from typing import Any

import pytest
import torch
from lora_runs import adapted, adapted_matrices
from torch import Tensor
from training_runs import Wrapper, basis, copies, learn, masks, step_at_random, subspaces

from fisherkit.errors import CheckpointError, TrainingError
from fisherkit.training import constrain


def deltas(model: Any) -> dict[str, Tensor]:
    """What merging the adapter would add to each weight, in float64."""
    before = copies(adapted_matrices(model))
    model.merge_adapter()
    after = adapted_matrices(model)
    found = {name: after[name].detach().double() - before[name].double() for name in before}
    model.unmerge_adapter()
    for name, weight in adapted_matrices(model).items():
        weight.data.copy_(before[name])
    return found


def share(delta: Tensor, u: Tensor | None, v: Tensor | None) -> float:
    inside = ([u.double().mT @ delta] if u is not None else []) + ([delta @ v.double()] if v is not None else [])
    return max(float(part.norm() / delta.norm()) for part in inside)


@pytest.mark.parametrize("sides", ["UV", "U", "V"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": False}])
def test_a_lora_delta_stays_out_of_the_protected_directions(options: dict[str, Any], sides: str) -> None:
    model = adapted(**options).double()
    parts = subspaces(adapted_matrices(model), sides=sides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    frozen = copies(adapted_matrices(model))
    constrain(optimizer, model, parts)
    learn(model, optimizer, 3)
    assert all(torch.equal(weight, frozen[name]) for name, weight in adapted_matrices(model).items())
    for name, delta in deltas(model).items():
        assert delta.norm() > 0
        assert share(delta, parts.get(f"{name}.U"), parts.get(f"{name}.V")) < 1e-6


def test_the_start_of_a_is_projected_at_once() -> None:
    model = adapted()
    parts = subspaces(adapted_matrices(model))
    constrain(torch.optim.AdamW(model.parameters()), model, parts)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            assert float((parameter.detach() @ parts[f"{weight}.V"]).abs().max()) < 1e-6
            assert parameter.detach().norm() > 0.1


def test_factors_are_projected_and_no_more() -> None:
    free, held = adapted(init_lora_weights=False), adapted(init_lora_weights=False)
    held.load_state_dict(free.state_dict())
    parts = subspaces(adapted_matrices(held))
    for model, mask in ((free, None), (held, parts)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if mask is not None:
            start = copies(dict(model.named_parameters()))
            constrain(optimizer, model, mask)
            for parameter in model.parameters():  # as it was before the call: only the step is looked at
                parameter.data.copy_(start[next(n for n, p in model.named_parameters() if p is parameter)])
        torch.manual_seed(0)
        step_at_random(model, optimizer, 1)
    others = dict(held.named_parameters())
    for name, parameter in free.named_parameters():
        weight = name.removeprefix("base_model.model.").replace(".lora_A.default", "").replace(".lora_B.default", "")
        wanted = parameter.detach().double()
        if ".lora_A." in name:
            v = parts[f"{weight}.V"].double()
            wanted = wanted - wanted @ v @ v.T
        elif ".lora_B." in name:
            u = parts[f"{weight}.U"].double()
            wanted = wanted - u @ u.T @ wanted
        assert torch.allclose(others[name].double(), wanted, atol=1e-6)


def test_conv1d_and_embeddings_are_stored_the_other_way_round() -> None:
    model = adapted("gpt2", target_modules=["c_attn", "wte"], fan_in_fan_out=True).double()
    weights = {
        name.replace(".base_layer", ""): weight
        for name, weight in model.get_base_model().named_parameters()
        if name.endswith("base_layer.weight") and ("c_attn" in name or "wte" in name)
    }
    parts = subspaces(weights)
    before = copies(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, parts)
    step_at_random(model, optimizer)
    model.merge_adapter()
    for name, weight in weights.items():
        delta = weight.detach().double() - before[name].double()
        assert delta.norm() > 0
        assert share(delta, parts[f"{name}.U"], parts[f"{name}.V"]) < 1e-6


def test_modules_that_are_saved_whole_obey_like_any_weight() -> None:
    model = adapted(modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save.default.weight
    before = head.detach().clone()
    u = basis(head.shape[0], 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, {"lm_head.weight.U": u})
    learn(model, optimizer, 2)
    assert share(head.detach().double() - before.double(), u, None) < 1e-6


def test_layer_scales_hold_for_factors() -> None:
    model = adapted(init_lora_weights=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    constrain(optimizer, model, [1.0, 1.0, 4.0])
    before = copies(dict(model.named_parameters()))
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients[name] = parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, gradient in gradients.items():
        moved = dict(model.named_parameters())[name].detach() - before[name]
        assert torch.allclose(moved, -(0.5 if ".layers.2." in name else 1.0) * gradient, atol=1e-6)


def test_wrapped_adapters_are_found() -> None:
    model = adapted(init_lora_weights=False)
    parts = subspaces(adapted_matrices(model))
    wrapped = Wrapper(model)
    handle = constrain(torch.optim.AdamW(wrapped.parameters()), wrapped, parts)
    assert len(list(handle.rules())) == 2 * len(adapted_matrices(model))


def test_what_cannot_hold_on_lora_is_refused_with_the_reason() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters())
    weights = adapted_matrices(model)
    with pytest.raises(TrainingError, match=r"binary mask.*LoRA.*subspace"):
        constrain(optimizer, model, masks(weights))
    name = "model.layers.0.mlp.up_proj.weight"  # no adapter on it, and frozen
    trained = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    with pytest.raises(TrainingError, match="none of its 1 weights"):
        constrain(trained, model, {name: torch.ones(48, 1, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match="do not fit"):
        constrain(optimizer, model, {"model.layers.0.self_attn.q_proj.weight.U": basis(31, 2)})
    dora = adapted(use_dora=True)
    with pytest.raises(TrainingError, match="DoRA"):
        constrain(torch.optim.AdamW(dora.parameters()), dora, subspaces(adapted_matrices(dora)))


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_lora_that_began_as_a_part_of_the_weight_is_refused(begun: str) -> None:
    """B A is not nothing there: out of the directions, the model would lose what it had in them."""
    model = adapted(init_lora_weights=begun)
    with pytest.raises(TrainingError, match=f"init_lora_weights='{begun}'.*init_lora_weights=True"):
        constrain(torch.optim.AdamW(model.parameters()), model, subspaces(adapted_matrices(model)))


def test_lora_on_fused_experts_is_refused() -> None:
    model = adapted("qwen3-moe", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    with pytest.raises(TrainingError, match="LoRA on fused experts"):
        constrain(torch.optim.AdamW(model.parameters()), model, {f"{name}.U": basis(32, 2)})
