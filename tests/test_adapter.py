"""Tensors tuned by an adapter are those that peft merges, to 1e-6 in float32; nothing in the adapter is left out.

The oracle is peft itself: load, merge_and_unload, save_pretrained, read back under the names on disk.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import tiny
import torch
import transformers
from peft_adapters import EXPERTS, LINEAR, assert_close, edit_config, edit_tensors, merged, train, tuned, values
from transformers import AutoModelForCausalLM

from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.lora.adapter import Adapter, is_adapter
from fisherkit.checkpoint.names.spelling import pieces

# What peft can train, by architecture and LoraConfig; r and lora_alpha have defaults in `train`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": LINEAR}),
    "rank-stabilised": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers\.[12]\.mlp\.down_proj": 6},
            "alpha_pattern": {r"layers\.1\..*": 3, "q_proj": 32, "proj": 100},
        },
    ),
    "patterns, rank-stabilised": (
        "llama",
        {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
    ),
    "DoRA": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "modules to save": ("llama", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "a block to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "biases beside": ("qwen2", {"target_modules": ["q_proj", "o_proj"]}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "tokens": ("llama", {"target_modules": LINEAR, "trainable_token_indices": [5, 3, 399]}),
    "tokens of two": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [1, 2, 7]}},
    ),
    "tokens, tied": ("llama-tied", {"target_modules": LINEAR, "trainable_token_indices": [0, 9]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding, DoRA": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "embedding, tied": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head, tied": ("llama-tied", {"target_modules": ["lm_head"]}),
    "experts": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "experts, rank-stabilised": (
        "qwen3-moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "use_rslora": True,
            "rank_pattern": {r"experts\.gate_up_proj": 8, "down_proj": 2},
            "alpha_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 5},
        },
    ),
    "experts, one of two": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    "Mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
    "experts fused on disk": (
        "gemma4-moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts transposed on disk": ("gpt-oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "multimodal": (
        "gemma4-31b",
        {"target_modules": r".*language_model.*\.(q_proj|down_proj)|.*vision.*q_proj\.linear"},
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, DoRA": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "Conv1D and embedding": ("gpt2", {"target_modules": ["c_proj", "wte"]}),
    "GPT-NeoX": ("gpt-neox", {"target_modules": ["query_key_value", "embed_out"]}),
}


@pytest.fixture(scope="module")
def model_of(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The shared checkpoints, and one of gpt-oss whose down_proj is square: only its neighbour tells how it lies."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture != "gpt-oss":
            return checkpoint(architecture)
        if architecture not in made:
            made[architecture] = folder = tmp_path_factory.mktemp("gpt-oss")
            changes = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
            config = transformers.GptOssConfig(**{**tiny._BASE, **changes})
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return made[architecture]

    return get


@pytest.mark.parametrize("case", CASES)
def test_tuned_values_are_those_that_peft_merges(case: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    architecture, lora = CASES[case]
    base = model_of(architecture)
    adapter = train(base, tmp_path / "adapter", **lora)
    assert_close(tuned(base, adapter), merged(base, adapter, tmp_path / "merged"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_of_16_bits_are_widened_before_they_are_multiplied(
    dtype: torch.dtype, adapter: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    edit_tensors(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert_close(tuned(checkpoint("llama"), adapter), merged(checkpoint("llama"), adapter, tmp_path / "merged"))


def test_a_file_of_torch_holds_the_same_adapter(adapter: Path, checkpoint: Callable[[str], Path]) -> None:
    wanted = tuned(checkpoint("llama"), adapter)
    torch.save(safetensors.torch.load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_close(tuned(checkpoint("llama"), adapter), wanted, exactly=True)


def test_the_name_of_the_adapter_inside_of_keys_makes_no_difference(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], use_dora=True)
    wanted = tuned(base, adapter)
    ends = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def named(key: str) -> str:
        return re.sub(rf"\.({'|'.join(ends)})", r".\1.mine", key)

    edit_tensors(adapter, lambda tensors: {named(key): tensor for key, tensor in tensors.items()})
    assert_close(tuned(base, adapter), wanted, exactly=True)


def test_an_adapter_of_the_text_model_fits_the_multimodal_one(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("gemma4-31b")
    adapter = train(base, tmp_path / "adapter", target_modules=r".*language_model.*\.q_proj")
    wanted = tuned(base, adapter)
    edit_tensors(adapter, lambda tensors: {k.replace("language_model.", ""): v for k, v in tensors.items()})
    assert_close(tuned(base, adapter), wanted, exactly=True)


def test_fused_or_apart_the_experts_of_the_base_become_the_same(
    experts: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    apart = tuned(checkpoint("qwen3-moe"), experts)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3-moe"))
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = tuned(tmp_path / "fused", experts)
    for name, parts in pieces({name: weight.shape for name, weight in fused.items()}).items():
        for piece in parts:
            found = fused[name] if piece.expert is None else fused[name][piece.expert, piece.start : piece.stop]
            np.testing.assert_array_equal(found, apart[piece.spelling])


def apart(folder: Path, expert_count: int = 4) -> None:
    """Rewrite an adapter of fused experts as one of transformers 4: factors for each expert's own linear layers."""

    def split(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for key, tensor in tensors.items():
            module, _, side = key.replace(".base_layer", "").rpartition(".lora_")
            if not module.endswith(".experts"):
                found[key] = tensor
                continue
            parts = ("gate_proj", "up_proj") if ".base_layer" in key else ("down_proj",)
            for expert in range(expert_count):
                if side == "A.weight":
                    mine = [tensor.reshape(expert_count, -1, tensor.shape[1])[expert]] * len(parts)
                else:
                    mine = list(tensor.reshape(tensor.shape[0], -1, expert_count)[:, :, expert].chunk(len(parts)))
                for part, factor in zip(parts, mine, strict=True):
                    found[f"{module}.{expert}.{part}.lora_{side}"] = factor.contiguous().clone()
        return found

    edit_tensors(folder, split)
    edit_config(folder, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], target_parameters=None)


def test_factors_of_experts_that_older_peft_wrote_the_other_way_round_make_the_same(
    experts: Path, checkpoint: Callable[[str], Path]
) -> None:
    wanted = tuned(checkpoint("qwen3-moe"), experts)

    def turn(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = dict(tensors)
        for key in (key for key in tensors if "experts" in key and "lora_A" in key):
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            found[key] = b.reshape(b.shape[0], -1, 4).permute(2, 1, 0).reshape(-1, b.shape[0]).contiguous()
            turned = a.reshape(4, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)
            found[key.replace("lora_A", "lora_B")] = turned.contiguous()
        return found

    edit_tensors(experts, turn)
    edit_config(experts, peft_version="0.18.1")
    assert_close(tuned(checkpoint("qwen3-moe"), experts), wanted)


@pytest.mark.parametrize("layout", ["disk", "memory"])
def test_factors_for_each_expert_make_the_same_as_shared_ones(
    layout: str, experts: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("qwen3-moe")
    if layout == "memory":
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "fused", save_original_format=False)
        base = tmp_path / "fused"
    wanted = tuned(base, experts)
    apart(experts)
    assert_close(tuned(base, experts), wanted)


def test_experts_to_save_are_put_in_their_places(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("qwen3-moe")
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["experts"])
    assert_close(tuned(base, adapter), merged(base, adapter, tmp_path / "merged"))


def test_a_copy_of_the_base_in_fewer_bits_changes_nothing_by_itself(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    adapter = train(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    wanted = tuned(base, adapter)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(adapter, lambda tensors: tensors | {key: tensors[key].bfloat16()})
    assert_close(tuned(base, adapter), wanted, exactly=True)


def test_a_copy_that_is_not_the_base_is_what_the_adapter_adds_to(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    adapter = train(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(adapter, lambda tensors: tensors | {key: tensors[key] + 1})
    assert_close(tuned(base, adapter), merged(base, adapter, tmp_path / "merged"))


def test_embeddings_stored_twice_but_tied_both_change(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base, both = checkpoint("llama-tied"), tmp_path / "both"
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[7, 1])
    wanted = tuned(base, adapter)
    tensors = values(base)
    both.mkdir()
    shutil.copy(base / "config.json", both)
    safetensors.numpy.save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, both / "m.safetensors"
    )
    found = tuned(both, adapter)
    np.testing.assert_array_equal(found.pop("lm_head.weight"), wanted["model.embed_tokens.weight"])
    assert_close(found, wanted, exactly=True)


def test_equal_tensors_for_tied_embeddings_are_one(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("llama-tied")
    adapter = train(
        base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    assert_close(tuned(base, adapter), merged(base, adapter, tmp_path / "merged"))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_embeddings_that_were_saved_untrained_change_nothing(
    architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint(architecture)
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"], embeddings=True)
    before = values(base)
    with Adapter.open(adapter, open_index(base)) as opened:
        assert "model.embed_tokens.weight" in opened.touched
        found = {name: opened.tuned(name, weight) for name, weight in before.items()}
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert_close(found, merged(base, adapter, tmp_path / "merged"))


def test_an_output_of_zeros_stays_zero_under_dora(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("llama")
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(adapter, lambda tensors: {k: v * ("lora_B" not in k) for k, v in tensors.items()})
    with Adapter.open(adapter, open_index(base)) as opened:
        weight = values(base)[name]
        weight[3] = 0
        found = opened.tuned(name, weight)
    assert np.isfinite(found).all()
    assert not found[3].any()


def test_threads_get_what_one_gets(experts: Path, checkpoint: Callable[[str], Path]) -> None:
    base = values(checkpoint("qwen3-moe"))
    with Adapter.open(experts, open_index(checkpoint("qwen3-moe"))) as opened:
        alone = {name: opened.tuned(name, base[name]) for name in opened.touched}
        with ThreadPoolExecutor(4) as pool:
            together = dict(zip(alone, pool.map(lambda name: opened.tuned(name, base[name]), alone), strict=True))
    assert_close(together, alone, exactly=True)


def test_it_says_what_it_is(adapter: Path, checkpoint: Callable[[str], Path]) -> None:
    base = checkpoint("llama")
    assert is_adapter(adapter)
    assert not is_adapter(base)
    assert not is_adapter(adapter / "adapter_config.json")
    edit_config(adapter, base_model_name_or_path=None)
    with Adapter.open(adapter, open_index(base)) as opened:
        assert (opened.rank, opened.base_model, opened.notes) == (4, None, ())


def test_an_adapter_of_another_name_is_noted(adapter: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base, commit = checkpoint("llama"), "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--org--llama" / "snapshots" / commit
    shutil.copytree(base, snapshot)

    def notes(name: str, revision: str | None, folder: Path) -> tuple[str, ...]:
        edit_config(adapter, base_model_name_or_path=name, revision=revision)
        with Adapter.open(adapter, open_index(folder)) as opened:
            return opened.notes

    assert notes(str(base), None, base) == notes(f"org/{base.name}", "main", base) == ()
    assert notes("org/Llama", commit, snapshot) == notes("org/llama", "main", snapshot) == ()
    assert "was trained on org/other, and BASE is" in notes("org/other", None, base)[0]
    assert f"was trained on commit {commit[::-1]} of org/llama" in notes("org/llama", commit[::-1], snapshot)[0]


def test_what_is_done_to_tied_embeddings_is_noted(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("llama-tied")
    with Adapter.open(train(base, tmp_path / "a", target_modules=["lm_head"]), open_index(base)) as opened:
        assert "lm_head is done to both, as peft merges it" in opened.notes[0]


def test_reading_an_adapter_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'peft'} & sys.modules.keys()"
    code = f"import sys, fisherkit.checkpoint.lora.adapter; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
