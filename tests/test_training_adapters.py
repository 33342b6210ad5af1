"""Adapters that are no LoRA: what moves a masked weight is held or refused by the name of its kind."""

from typing import Any

import pytest
import torch
from torch import nn
from training_runs import basis, check_frozen, copies, learn, llama, masks, matrices

from fisherkit.errors import TrainingError
from fisherkit.training import constrain

peft = pytest.importorskip("peft")

QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
KINDS = {
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=["q_proj"]),
}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # peft's


def adapted(config: Any, architecture: str = "llama") -> Any:
    config.task_type = "CAUSAL_LM"
    return peft.get_peft_model(llama(architecture), config)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_moves_a_masked_weight_is_refused_by_its_name(kind: str) -> None:
    model = adapted(KINDS[kind]())
    frozen = {QUERY: torch.zeros(32, 1, dtype=torch.bool)}
    with pytest.raises(TrainingError, match=f"{QUERY} is moved by an adapter of kind '{kind}', which no mask"):
        constrain(trained(model), model, frozen)
    with pytest.raises(TrainingError, match=f"{QUERY} is moved by an adapter of kind '{kind}', which no subspace"):
        constrain(trained(model), model, {f"{QUERY}.U": basis(32, 2)})


def test_full_training_beside_an_adapter_does_not_hide_it() -> None:
    """A mask of the head, trained whole, and of a projection under LoHa."""
    config = KINDS["loha"]()
    config.modules_to_save = ["lm_head"]
    model = adapted(config)
    rows = model.get_output_embeddings().weight.shape[0]
    flags = {"lm_head.weight": torch.zeros(rows, 1, dtype=torch.bool), QUERY: torch.zeros(32, 1, dtype=torch.bool)}
    with pytest.raises(TrainingError, match=f"{QUERY} is moved by an adapter of kind 'loha'"):
        constrain(trained(model), model, flags)


def test_a_mask_of_other_weights_holds_beside_an_adapter() -> None:
    model = adapted(KINDS["loha"]())
    weights = {n: w for n, w in matrices(model.get_base_model()).items() if "up_proj" in n}
    for weight in weights.values():
        weight.requires_grad_()
    before, flags = copies(weights), masks(weights)
    optimizer = trained(model)
    constrain(optimizer, model, flags)
    learn(model, optimizer)
    check_frozen(before, weights, flags)


def test_an_adapter_is_scaled_by_layer_unless_its_tensor_is_shared_by_layers() -> None:
    model = adapted(KINDS["loha"]())
    handle = constrain(trained(model), model, [1.0, 1.0, 100.0])
    scaled = {rule.parameter for rule in handle.rules()}
    assert scaled == {p for n, p in model.named_parameters() if p.requires_grad and ".layers.2." in n}
    shared = adapted(peft.VBLoRAConfig(num_vectors=8, vector_length=8, topk=2, target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match="layers 0 to 2 share one trained tensor"):
        constrain(trained(shared), shared, [1.0, 1.0, 100.0])


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_trained_tokens_are_refused_under_a_mask_of_the_embedding_alone(architecture: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]})
    model = adapted(config, architecture)
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(TrainingError, match=f"{EMBEDDING} is moved by an adapter of kind 'trainable_tokens'"):
        constrain(trained(model), model, {EMBEDDING: torch.ones(rows, 1, dtype=torch.bool)})
    other = model.get_base_model().model.layers[0].mlp.up_proj.weight
    other.requires_grad_()
    before = copies({"w": other})
    flags = masks({"w": other})
    optimizer = trained(model)
    constrain(optimizer, model, {"model.layers.0.mlp.up_proj.weight": flags["w"]})
    learn(model, optimizer, 2)
    check_frozen(before, {"w": other}, flags)


def test_adalora_stays_out_of_a_subspace_as_lora_does() -> None:
    """Between B and A it has a diagonal, which leaves both where they are."""
    model = adapted(peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"])).double()
    u, v = basis(32, 4).double(), basis(32, 4, seed=1).double()
    optimizer = trained(model)
    weight = model.get_base_model().model.layers[0].self_attn.q_proj
    constrain(optimizer, model, {f"{QUERY}.U": u, f"{QUERY}.V": v})
    for _ in range(3):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    delta = weight.get_delta_weight("default").detach()
    assert float(delta.norm()) > 0
    assert float((u.mT @ delta).norm() / delta.norm()) < 1e-6
    assert float((delta @ v).norm() / delta.norm()) < 1e-6
