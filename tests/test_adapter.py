"""Tensors tuned by an adapter are those that peft merges, to 1e-6 in float32; nothing in the adapter is left out.

The oracle is peft itself: load, merge_and_unload, save_pretrained, read back under the names on disk.
"""

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import tiny
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.lora.adapter import Adapter, is_adapter
from fisherkit.checkpoint.names.spelling import pieces
from fisherkit.errors import CheckpointError
from fisherkit.floats import widen

Floats = NDArray[np.float32]
Edit = Callable[[Path], None]

_LINEAR = ["q_proj", "v_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# What peft can train, by architecture and LoraConfig; r and lora_alpha have defaults in `train`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": _LINEAR}),
    "rank-stabilised": ("llama", {"target_modules": _LINEAR, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": _LINEAR,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers\.[12]\.mlp\.down_proj": 6},
            "alpha_pattern": {r"layers\.1\..*": 3, "q_proj": 32, "proj": 100},
        },
    ),
    "patterns, rank-stabilised": (
        "llama",
        {"target_modules": _LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
    ),
    "DoRA": ("llama", {"target_modules": _LINEAR, "use_dora": True}),
    "modules to save": ("llama", {"target_modules": _LINEAR, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "a block to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "biases beside": ("qwen2", {"target_modules": ["q_proj", "o_proj"]}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "tokens": ("llama", {"target_modules": _LINEAR, "trainable_token_indices": [5, 3, 399]}),
    "tokens of two": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [1, 2, 7]}},
    ),
    "tokens, tied": ("llama-tied", {"target_modules": _LINEAR, "trainable_token_indices": [0, 9]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding, DoRA": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "embedding, tied": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head, tied": ("llama-tied", {"target_modules": ["lm_head"]}),
    "experts": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": [*_EXPERTS, "mlp.gate.weight"]}),
    "experts, rank-stabilised": (
        "qwen3-moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": _EXPERTS,
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
    "experts transposed on disk": ("gpt-oss", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}),
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


@contextmanager
def quiet() -> Iterator[None]:
    """What peft warns of is what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quiet()
def train(base: Path, folder: Path, *, embeddings: bool | str = "auto", **lora: Any) -> Path:
    """A saved adapter, all of whose tensors are random: the usual start, B = 0, changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.5 if "magnitude" in name else 0.0))
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def values(folder: Path) -> dict[str, Floats]:
    with ArrayReader(open_index(folder)) as reader:
        return {name: widen(reader.read(name), info.dtype) for name, info in reader.index.tensors.items()}


@quiet()
def merged(base: Path, adapter: Path, folder: Path) -> dict[str, Floats]:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return values(folder)


def tuned(base: Path, adapter: Path) -> dict[str, Floats]:
    """Every tensor of the base as the adapter makes it; what is touched must have changed, and the rest must not."""
    before = values(base)
    with Adapter.open(adapter, open_index(base)) as opened:
        after = {name: opened.tuned(name, weight) for name, weight in before.items()}
        changed = tuple(name for name in before if not np.array_equal(before[name], after[name]))
        assert opened.touched == changed
    assert_close(before, values(base), exactly=True)
    return after


def assert_close(found: dict[str, Floats], wanted: dict[str, Floats], *, exactly: bool = False) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == np.float32
        assert np.isfinite(found[name]).all()
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=0 if exactly else 1e-6, err_msg=name)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


@pytest.mark.parametrize("case", CASES)
def test_tuned_values_are_those_that_peft_merges(case: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    architecture, lora = CASES[case]
    base = model_of(architecture)
    adapter = train(base, tmp_path / "adapter", **lora)
    assert_close(tuned(base, adapter), merged(base, adapter, tmp_path / "merged"))


@pytest.fixture
def adapter(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A plain adapter of llama, to be changed."""
    return train(checkpoint("llama"), tmp_path / "adapter", target_modules=_LINEAR)


@pytest.fixture
def experts(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """An adapter of the experts of qwen3-moe, to be changed."""
    return train(checkpoint("qwen3-moe"), tmp_path / "adapter", target_modules=["q_proj"], target_parameters=_EXPERTS)


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


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def _put(key: str, value: Any) -> Edit:
    """Change or (None) drop one tensor."""
    return lambda folder: edit_tensors(
        folder, lambda tensors: {k: v for k, v in (tensors | {key: value}).items() if v is not None}
    )


def _set(**changes: Any) -> Edit:
    return lambda folder: edit_config(folder, **changes)


def _rename(old: str, new: str) -> Edit:
    return lambda folder: edit_tensors(folder, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})


def _write(name: str, text: str) -> Edit:
    return lambda folder: bool((folder / name).write_text(text)) and None


MERGE_FIRST = r"merge it first: from peft import .*merge_and_unload\(\); model.save_pretrained\('merged'\)$"
REFUSED: dict[str, tuple[Edit, str]] = {
    "another method": (_set(peft_type="IA3"), "an adapter with peft_type 'IA3' is not read here; " + MERGE_FIRST),
    "biases": (_set(bias="lora_only"), "trained biases is not read here; " + MERGE_FIRST),
    "biases of factors": (_set(lora_bias=True), MERGE_FIRST),
    "replicated layers": (_set(layer_replication=[[0, 2], [1, 3]]), "replicated layers is not .*" + MERGE_FIRST),
    "KaSA": (_set(kasa_config={"beta": 1}), MERGE_FIRST),
    "block-diagonal": (_set(use_bdlora={"nblocks": 2}), MERGE_FIRST),
    "a start out of the base": (
        _set(init_lora_weights="pissa_niter_16"),
        "'pissa_niter_16', which changes.*" + MERGE_FIRST,
    ),
    "activated": (_set(alora_invocation_tokens=[1]), "activated LoRA cannot be merged into weights, by peft neither"),
    "QA-LoRA": (_set(use_qalora=True), "cannot be merged into weights"),
    "unknown tensor": (
        _put(f"{Q0}.lora_C.weight", torch.ones(2)),
        r"'.*lora_C.weight' stands for is not.*" + MERGE_FIRST,
    ),
    "bias of a factor": (_put(f"{Q0}.lora_B.bias", torch.ones(2)), r"'.*lora_B.bias' stands for is not known"),
    "several adapters": (
        _put(f"{Q0}.lora_A.two.weight", torch.ones(4, 32)),
        r"several adapters \(one without a name, two\); save the one",
    ),
    "no place": (
        _rename("layers.0.self_attn", "layers.7.self_attn"),
        "4 of 18 tensors match no weight of .*llama.*, the first '.*layers.7.*'",
    ),
    "no place for one": (
        _put("base_model.model.score.weight", torch.ones(2, 32)),
        "1 of 19 tensors match no weight .*score.weight'",
    ),
    "too wide": (
        _put(f"{Q0}.lora_A.weight", torch.ones(4, 31)),
        r"shape \[32, 31\], and 'model.layers.0.self_attn.q_proj.weight' in .* has \[32, 32\]",
    ),
    "vocabulary": (
        _put("base_model.model.lm_head.weight", torch.ones(401, 32)),
        r"\[401, 32\], and 'lm_head.weight' in .* has \[400, 32\]; is it",
    ),
    "other ranks": (
        _put(f"{Q0}.lora_A.weight", torch.ones(5, 32)),
        r"is \[5, 32\] and '.*lora_B.weight' \[32, 4\], which have no product",
    ),
    "one factor": (_put(f"{Q0}.lora_B.weight", None), "q_proj.*' has one of its two factors only"),
    "a vector": (_put(f"{Q0}.lora_B.weight", torch.ones(32)), "is no matrix; " + MERGE_FIRST),
    "magnitudes without DoRA": (
        _put(f"{Q0}.lora_magnitude_vector", torch.ones(32)),
        "use_dora is false, which the magnitudes of",
    ),
    "DoRA without magnitudes": (_set(use_dora=True), "use_dora is true, which the magnitudes of"),
    "NaN": (_put(f"{Q0}.lora_A.weight", torch.full((4, 32), torch.nan)), "q_proj.lora_A.weight' holds NaN or infinity"),
    "infinity": (
        _put(f"{Q0}.lora_B.weight", torch.full((32, 4), torch.inf).bfloat16()),
        "q_proj.lora_B.weight' holds NaN",
    ),
    "nothing gathered": (_put(f"{Q0}.lora_A.weight", torch.ones(0)), "is empty, as one of several processes saves it"),
    "integers": (
        _put(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.uint8)),
        "is stored as U8, which is no type",
    ),
    "square, either way": (
        _set(fan_in_fan_out=True),
        "says fan_in_fan_out, and which way 'model.layers.0.self_attn.q_proj.weight' lies",
    ),
    "changed twice": (
        _put("base_model.model.model.layers.0.self_attn.q_proj.weight", torch.ones(32, 32)),
        "both change 'model.layers.0.self_attn.q_proj.weight'",
    ),
    "tokens unnamed": (
        _put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 32)),
        "names 0 trainable tokens of 'model.embed_tokens', and .* has 2",
    ),
    "alpha": (_set(lora_alpha="8"), "lora_alpha is '8', not a number"),
    "alpha of NaN": (_set(lora_alpha=float("nan")), "lora_alpha is nan, not a number"),
    "patterns": (_set(alpha_pattern={"q_(proj": 3}), "'q_.proj' is not a regular expression"),
    "patterns of lists": (_set(rank_pattern=[3]), "rank_pattern is not an object"),
    "names": (_set(modules_to_save="lm_head"), "modules_to_save is not a list of names"),
    "indices": (
        _set(trainable_token_indices={"embed_tokens": "all"}),
        "trainable_token_indices are not lists of numbers",
    ),
    "no JSON": (_write("adapter_config.json", "{"), "adapter configuration is not valid JSON"),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "adapter_config.json: cannot be read: No such file",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has adapter_config.json but no adapter_model.safetensors",
    ),
    "cut short": (_write("adapter_model.safetensors", "abc"), "truncated|not a safetensors file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(
    case: str, adapter: Path, checkpoint: Callable[[str], Path]
) -> None:
    edit, message = REFUSED[case]
    edit(adapter)
    with pytest.raises(CheckpointError, match=message) as caught:
        Adapter.open(adapter, open_index(checkpoint("llama")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"modules_to_save": ["embed_tokens"]},
            "makes embedding and head differ, which are one weight in .*" + MERGE_FIRST,
        ),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "makes embedding and head differ"),
        (
            {"target_modules": ["embed_tokens", "lm_head"]},
            "lora_A.* and .*lora_embedding_A' both change 'model.embed_tok",
        ),
    ],
)
def test_tied_embeddings_that_come_apart_are_refused(
    lora: dict[str, Any], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama-tied")
    adapter = train(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **lora})
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(adapter, open_index(base))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([5, 3], "names 2 trainable tokens of 'model.embed_tokens', and .* has 3"),
        ({"wte": [5, 3, 1]}, "names 0 trainable tokens of 'model.embed_tokens'"),
        ([5, 400, 3], "trains token 400, and 'model.embed_tokens.weight' in .* has 400; is it"),
        ([5, -1, 3], "trains token"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    indices: Any, message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[5, 9, 3])
    edit_config(adapter, trainable_token_indices=indices)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(adapter, open_index(base))


def without_expert(base: Path, folder: Path) -> Path:
    """A copy of the base, less the last expert of every block."""
    folder.mkdir()
    tensors = {name: weight for name, weight in values(base).items() if ".experts.3." not in name}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_experts_of_another_number_are_refused(
    experts: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = without_expert(checkpoint("qwen3-moe"), tmp_path / "fewer")
    with pytest.raises(
        CheckpointError, match=r"has 16 rows, which are not 4 for each of the 3 experts in .*fewer; is it"
    ):
        Adapter.open(experts, open_index(base))


def test_a_quantised_base_is_refused(adapter: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    tensors: dict[str, NDArray[Any]] = dict(values(checkpoint("llama")))
    name = "model.layers.0.self_attn.q_proj.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(np.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}' is stored as U8, so nothing can be added to it; give the"):
        Adapter.open(adapter, open_index(tmp_path / "m.safetensors"))


def test_an_adapter_of_other_modules_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = train(checkpoint("gpt2"), tmp_path / "adapter", target_modules=["c_attn"])
    with pytest.raises(
        CheckpointError, match=r"6 of 6 tensors match no weight of .*is it the adapter of another model"
    ):
        Adapter.open(adapter, open_index(checkpoint("llama")))


def test_a_closed_adapter_cannot_be_asked(adapter: Path, checkpoint: Callable[[str], Path]) -> None:
    opened = Adapter.open(adapter, open_index(checkpoint("llama")))
    opened.close()
    opened.close()
    name = opened.touched[0]
    with pytest.raises(ValueError, match="already closed"):
        opened.tuned(name, values(checkpoint("llama"))[name])
