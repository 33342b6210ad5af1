"""A mask keyed by checkpoint names finds its weights in any model that was loaded from that checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import tiny
import torch
from torch import nn
from training_runs import Wrapper, bits, check_frozen, copies, learn, llama, masks, matrices, step_at_random, subspaces
from transformers import AutoModelForCausalLM

from fisherkit.training import constrain
from fisherkit.training.names import read_names, spelled


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((name, "rows") for name in tiny.CONFIGS), *((n, "elements") for n in ("qwen3-moe", "gemma4-moe", "gpt2"))],
)
def test_what_is_frozen_is_the_same_on_disk_after_training(
    architecture: str, kind: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    before = pairs.tensors(checkpoint(architecture))
    weights = {name: t for name, t in before.items() if "vision" not in name and "layer_scalar" not in name}
    flags = masks({name: t for name, t in weights.items() if t.ndim > 1}, kind)
    flags |= masks({name: t for name, t in weights.items() if t.ndim == 1}, "elements")
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint(architecture))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    constrain(optimizer, model, flags)
    step_at_random(model, optimizer)
    model.save_pretrained(tmp_path)
    check_frozen(before, pairs.tensors(tmp_path), flags)


@pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral", "gemma4-moe"])
def test_experts_that_are_fused_in_memory_are_projected_one_by_one(
    architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    before = pairs.tensors(checkpoint(architecture))
    weights = {name: tensor for name, tensor in before.items() if ".experts." in name}
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint(architecture))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    parts = {}
    for number, (name, weight) in enumerate(weights.items()):
        own = subspaces({name: weight} if weight.ndim == 2 else {name: weight[0]}, 1 + number % 3)
        parts |= (
            own if weight.ndim == 2 else {key: side.expand(weight.shape[0], *side.shape) for key, side in own.items()}
        )
    constrain(optimizer, model, parts)
    step_at_random(model, optimizer)
    model.save_pretrained(tmp_path)
    after = pairs.tensors(tmp_path)
    for name, weight in weights.items():
        change = after[name].double() - weight.double()
        assert float((parts[f"{name}.U"].double().mT @ change).norm() / change.norm()) < 1e-6
        assert float((change @ parts[f"{name}.V"].double()).norm() / change.norm()) < 1e-6


def test_some_experts_may_be_masked_and_the_others_free(checkpoint: Callable[[str], Path]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3-moe"))
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    before = fused.detach().clone()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, {name: torch.zeros(16, 1, dtype=torch.bool)})
    step_at_random(model, optimizer)
    changed = (bits(before) != bits(fused)).any(-1)
    assert not changed[2, 16:].any()
    assert changed[2, :16].float().mean() > 0.9
    assert changed[[0, 1, 3]].float().mean() > 0.9


def test_a_mask_of_a_fused_checkpoint_holds_too(checkpoint: Callable[[str], Path]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3-moe"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weights = {name: model.get_parameter(name)}
    before, flags = copies(weights), masks(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, flags)
    step_at_random(model, optimizer)
    check_frozen(before, weights, flags)


def test_tied_weights_change_where_both_names_allow_it() -> None:
    model = llama("llama-tied")
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    flags = {
        "lm_head.weight": torch.rand(weight.shape[0], 1) < 0.7,
        "model.embed_tokens.weight": torch.rand(1, weight.shape[1]) < 0.7,
    }
    before = copies({"w": weight})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, flags)
    step_at_random(model, optimizer)
    first, second = flags.values()
    check_frozen(before, {"w": weight}, {"w": first & second})


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        lambda model: Wrapper(Wrapper(model)),
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(Wrapper(model), backend="eager"),
        lambda model: Wrapper(torch.compile(model, backend="eager")),
    ],
)
def test_wrappers_do_not_hide_a_weight(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = llama()
    weights = matrices(model)
    before, flags = copies(weights), masks(weights)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    constrain(optimizer, wrapped, flags)
    step_at_random(model, optimizer)
    check_frozen(before, weights, flags)


@pytest.mark.parametrize(
    "name",
    [
        "module.model.layers.0.mlp.up_proj.weight",
        "_orig_mod.module.model.layers.0.mlp.up_proj.weight",
        "module.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.modules_to_save.default.weight",
    ],
)
def test_names_of_one_weight_are_spelled_alike(name: str) -> None:
    assert spelled(name) == "model.layers.0.mlp.up_proj.weight"


def test_a_mask_of_the_multimodal_checkpoint_holds_on_the_text_model() -> None:
    model = llama()
    flags = {name.replace("model.", "model.language_model.", 1): own for name, own in masks(matrices(model)).items()}
    before = copies(matrices(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, flags)
    learn(model, optimizer, 1)
    check_frozen(before, matrices(model), masks(matrices(model)))


def test_names_that_only_transformers_knows_are_renamed_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renaming = WeightRenaming(r"\.feed_forward\.lifting\.", ".mlp.up_proj.")
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [renaming])
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    before, flags = copies({"w": weight}), masks({"w": weight})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrain(optimizer, model, {"model.layers.0.feed_forward.lifting.weight": flags["w"]})
    learn(model, optimizer, 1)
    check_frozen(before, {"w": weight}, flags)


def test_every_tensor_of_a_checkpoint_has_a_place(checkpoint: Callable[[str], Path]) -> None:
    for architecture in ("llama", "qwen3-moe", "gemma4-31b"):
        folder = checkpoint(architecture)
        names = read_names(AutoModelForCausalLM.from_pretrained(folder))
        for name, tensor in pairs.tensors(folder).items():
            if "layer_scalar" not in name:
                target = names.find(name)
                assert target is not None, name
                assert target.shape == tuple(tensor.shape)
