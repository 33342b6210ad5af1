"""Equal spellings are the same weights, in every layout that transformers reads or writes; other weights differ."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import transformers
from numpy.typing import NDArray

from fisherkit.checkpoint.names.spelling import Piece, pieces, spelling

Arrays = dict[str, NDArray[np.generic]]

SAME = [
    ("model.layers.0.mlp.up_proj.weight", "base_model.model.model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.language_model.model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "module._orig_mod.model.layers.0.mlp.up_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.base_layer.weight"),
    ("lm_head.weight", "language_model.lm_head.weight"),
    ("lm_head.weight", "base_model.model.lm_head.modules_to_save.default.weight"),
    ("lm_head.weight", "embed_out.weight"),
    ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
    ("backbone.layers.0.norm.weight", "model.layers.0.norm.weight"),
    ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.router.weight"),
    ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.0.mlp.experts.7.gate_proj.weight"),
    ("model.layers.0.block_sparse_moe.experts.7.w2.weight", "model.layers.0.mlp.experts.7.down_proj.weight"),
    ("model.layers.0.block_sparse_moe.experts.7.w3.weight", "model.layers.0.mlp.experts.7.up_proj.weight"),
    ("vision_tower.encoder.layers.0.q_proj.weight", "model.vision_tower.encoder.layers.0.q_proj.weight"),
    ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
]

DIFFERENT = [
    ("model.layers.0.self_attn.q_proj.weight", "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"),
    ("model.layers.0.self_attn.q_proj.weight", "model.vision_tower.layers.0.self_attn.q_proj.weight"),
    ("model.layers.0.self_attn.q_proj.weight", "model.audio_tower.layers.0.self_attn.q_proj.weight"),
    ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
    ("model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.experts.11.up_proj.weight"),
    ("model.layers.0.feed_forward.w1.weight", "model.layers.0.feed_forward.gate_proj.weight"),
    ("talker.model.layers.0.norm.weight", "thinker.model.layers.0.norm.weight"),
    ("model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"),
]

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": ("DeepseekV3Config", {**_ROUTED, **_LATENT, "n_group": 1, "topk_group": 1}),
    "lfm2-moe": ("Lfm2MoeConfig", {**_EXPERTS, "layer_types": ["conv", "full_attention", "full_attention"]}),
    "ernie4.5-moe": ("Ernie4_5_MoeConfig", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    "minimax-m2": ("MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def cut(tensors: Arrays) -> Arrays:
    """All pieces by spelling; fails if two have one."""
    found: Arrays = {}
    for name, parts in pieces({name: tensor.shape for name, tensor in tensors.items()}).items():
        for piece in parts:
            assert piece.spelling not in found, (name, piece)
            start, count = piece.span(tensors[name].shape)
            run = tensors[name].ravel()[start : start + count]
            found[piece.spelling] = run.reshape(piece.shape_in(tensors[name].shape))
    return found


def saved(model: Any, folder: Path, *, original: bool) -> Arrays:
    model.save_pretrained(folder, save_original_format=original)
    return safetensors.numpy.load_file(folder / "model.safetensors")


def make_mixture(name: str) -> Any:
    kind, changes = MIXTURES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**tiny._BASE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("one", "other"), SAME)
def test_names_of_one_weight_have_one_spelling(one: str, other: str) -> None:
    assert spelling(one) == spelling(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_names_of_other_weights_have_other_spellings(one: str, other: str) -> None:
    assert spelling(one) != spelling(other)


@pytest.mark.parametrize("name", [name for pair in SAME + DIFFERENT for name in pair])
def test_a_spelling_is_its_own_spelling(name: str) -> None:
    assert spelling(spelling(name)) == spelling(name)


@pytest.mark.parametrize("name", [*tiny.CONFIGS, *MIXTURES])
def test_names_on_disk_and_in_memory_cut_into_the_same_pieces(name: str, tmp_path: Path) -> None:
    model = tiny.build(name) if name in tiny.CONFIGS else make_mixture(name)
    disk = cut(saved(model, tmp_path / "disk", original=True))
    memory = cut(saved(model, tmp_path / "memory", original=False))
    assert disk.keys() == memory.keys()
    for spelled, values in disk.items():
        np.testing.assert_array_equal(values, memory[spelled], err_msg=spelled)


def test_fused_experts_are_cut_gate_before_up_expert_by_expert() -> None:
    stack = np.arange(2 * 6 * 4, dtype=np.float32).reshape(2, 6, 4)
    down = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    found = cut({"x.mlp.experts.gate_up_proj": stack, "x.mlp.experts.down_proj": down})
    for expert in range(2):
        np.testing.assert_array_equal(found[f"x.mlp.experts.{expert}.gate_proj.weight"], stack[expert, :3])
        np.testing.assert_array_equal(found[f"x.mlp.experts.{expert}.up_proj.weight"], stack[expert, 3:])
        np.testing.assert_array_equal(found[f"x.mlp.experts.{expert}.down_proj.weight"], down[expert])
    assert len(found) == 6


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ((2, 4, 6), (2, 3, 4)),  # gpt-oss: [E, H, 2I] and [E, I, H]
        ((2, 4, 8), (2, 4, 4)),  # the same with I = H
        ((2, 6, 4), (3, 4, 3)),  # not of one model
        ((2, 6, 4), None),  # nothing to tell by
    ],
)
def test_experts_that_do_not_lie_output_first_stay_whole(up: tuple[int, ...], down: tuple[int, ...] | None) -> None:
    shapes = {"x.experts.gate_up_proj": up} | ({"x.experts.down_proj": down} if down else {})
    assert all(len(parts) == 1 and parts[0].expert is None for parts in pieces(shapes).values())


def test_experts_without_a_gate_are_cut() -> None:
    found = pieces({"m.experts.up_proj": (2, 3, 4), "m.experts.down_proj": (2, 4, 3)})
    assert found["m.experts.up_proj"][1] == Piece("m.experts.1.up_proj.weight", 1, 0, 3)
    assert found["m.experts.down_proj"][0] == Piece("m.experts.0.down_proj.weight", 0, 0, 4)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 5), (0, 5), (2, 3, 4)])
def test_a_tensor_that_is_not_fused_is_one_piece(shape: tuple[int, ...]) -> None:
    (piece,) = pieces({"model.norm.weight": shape})["model.norm.weight"]
    assert (piece.spelling, piece.expert) == ("model.norm.weight", None)
    assert piece.shape_in(shape) == shape
    assert piece.span(shape) == (0, np.prod(shape, dtype=int))


def test_pieces_cover_every_element_once(tmp_path: Path) -> None:
    memory = saved(tiny.build("qwen3-moe"), tmp_path, original=False)
    for name, parts in pieces({name: tensor.shape for name, tensor in memory.items()}).items():
        runs = [piece.span(memory[name].shape) for piece in parts]
        ends = [start + count for start, count in runs]
        assert [0, *ends[:-1]] == [start for start, _ in runs]
        assert ends[-1] == memory[name].size
