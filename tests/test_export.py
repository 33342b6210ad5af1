"""What other tools are told of a mask: exact counts for SHiRA, and settings that those tools read as they are meant."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mask_oracle import read_masks, write
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from fisherkit import MaskOptions, extract, mask
from fisherkit.errors import CheckpointError, OptionError, OutputError
from fisherkit.methods.export.configs import export, write_export
from fisherkit.options import ExportOptions, ExtractOptions

Checkpoint = Callable[[str], Path]
MODULES = ("self_attn.q_proj", "mlp.up_proj")


def graded(folder: Path, layers: int = 12) -> Path:
    """A global mask under which later layers may change more, and the first not at all."""
    arrays = {
        f"model.layers.{layer}.{module}.weight": np.full((10, 4), layer * (1 + (module == MODULES[1])), np.float32)
        + np.arange(40, dtype=np.float32).reshape(10, 4) / 8
        for layer in range(layers)
        for module in MODULES
    }
    fisher = write(folder / "fisher.safetensors", arrays, architecture="LlamaForCausalLM")
    return mask(fisher, folder / "mask.safetensors", MaskOptions(train="top", aggregate="none", scope="global")).path


def told(path: Path, to: str, **options: Any) -> dict[str, Any]:
    found = yaml.safe_load(export(path, ExportOptions(to=to, **options)))  # type: ignore[arg-type]
    assert isinstance(found, dict)
    return found


def densities(path: Path) -> dict[int, float]:
    flags = read_masks(path)
    layers = sorted({int(name.split(".")[2]) for name in flags})
    of = {n: np.concatenate([f.ravel() for name, f in flags.items() if f".{n}." in name]) for n in layers}
    return {layer: float(found.mean()) for layer, found in of.items()}


def test_mergekit_weighs_every_layer_by_its_density(tmp_path: Path) -> None:
    path = graded(tmp_path)
    config = told(path, "mergekit", tuned="org/tuned")
    assert config["base_model"] == "org/tiny"
    (model,) = config["models"]
    assert model["model"] == "org/tuned"
    assert model["parameters"]["weight"] == pytest.approx(list(densities(path).values()), abs=1e-6)
    assert told(path, "mergekit", base="x: y")["base_model"] == "x: y"


def test_mergekit_takes_layer_importance_as_well(tmp_path: Path) -> None:
    importance = tmp_path / "layer_importance.json"
    importance.write_text(json.dumps({"0": 1.0, "1": 4.0, "2": 1.0}))
    assert told(importance, "mergekit")["models"][0]["parameters"]["weight"] == [1.0, 0.5, 1.0]


def test_axolotl_trains_what_may_change_and_nothing_else(tmp_path: Path) -> None:
    path = graded(tmp_path)
    config, flags = told(path, "axolotl", learning_rate=2e-5), read_masks(path)
    patterns = [re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)) for pattern in config["unfrozen_parameters"]]
    for name in [*flags, "model.layers.0.input_layernorm.weight", "lm_head.weight"]:
        assert any(pattern.match(name) for pattern in patterns) == (name in flags and bool(flags[name].any()))
    assert any(not flag.any() for flag in flags.values())


def test_axolotl_rates_follow_the_density_and_layer_1_is_not_layer_10(tmp_path: Path) -> None:
    path = graded(tmp_path)
    config, shares = told(path, "axolotl", learning_rate=2e-5), densities(path)
    rates = {module: group["lr"] for group in config["lr_groups"] for module in group["modules"]}
    assert config["learning_rate"] == 2e-5
    for layer, share in shares.items():
        found = [rate for module, rate in rates.items() if module in f"model.layers.{layer}.mlp.up_proj.weight"]
        assert found == ([pytest.approx(2e-5 * share / max(shares.values()), rel=1e-4)] if share else [])


def test_llamafactory_trains_as_many_layers_at_the_better_end(tmp_path: Path) -> None:
    path = graded(tmp_path)
    config = told(path, "llamafactory")
    assert config["finetuning_type"] == "freeze"
    assert config["freeze_trainable_layers"] == round(sum(densities(path).values()))
    assert config["freeze_trainable_modules"] == "mlp"
    first = tmp_path / "layer_importance.json"
    first.write_text(json.dumps([1.0, 1.0, 1.0, 100.0, 100.0]))
    assert told(first, "llamafactory")["freeze_trainable_layers"] == -3
    assert told(first, "llamafactory")["freeze_trainable_modules"] == "all"


# SHiRA


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama_mask(checkpoint: Checkpoint, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shira")
    fisher = extract(checkpoint("llama"), prompts, folder / "fisher.safetensors", ExtractOptions(limit=2)).path
    return mask(fisher, folder / "mask.safetensors", MaskOptions(preset="fggm")).path


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # peft's
def test_shira_trains_exactly_as_many_entries_and_only_those_that_may_change(
    checkpoint: Checkpoint, llama_mask: Path, tmp_path: Path
) -> None:
    script = imported(write_export(llama_mask, tmp_path / "shira.py", ExportOptions(to="peft-shira")))
    base, flags = AutoModelForCausalLM.from_pretrained(checkpoint("llama")), read_masks(llama_mask)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, script.shira_config(base))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(3, 15)[None]
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    after = model.merge_and_unload().state_dict()
    assert len(flags) == 21
    for name, value in after.items():
        moved = (value != before[name]).numpy()
        if name not in flags:
            assert not moved.any()
            continue
        assert not (moved & ~flags[name]).any()
        assert 0 < moved.sum() <= script.RANK * sum(value.shape)


def test_shira_draws_with_a_seed_and_refuses_a_rank_that_the_mask_has_no_room_for(
    checkpoint: Checkpoint, llama_mask: Path, tmp_path: Path
) -> None:
    script = imported(write_export(llama_mask, tmp_path / "shira.py", ExportOptions(to="peft-shira")))
    base = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    layer = base.model.layers[0].self_attn.q_proj
    masks = [script.shira_config(base, r=1, seed=seed).mask_fn(layer, 1) for seed in (0, 0, 1)]
    assert [int(found.sum()) for found in masks] == [sum(layer.weight.shape)] * 3
    assert masks[0].dtype == layer.weight.dtype
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    flags = read_masks(llama_mask)
    room = min(int(flag.sum()) // sum(flag.shape) for flag in flags.values())
    assert room == script.RANK
    with pytest.raises(ValueError, match=rf"r=20 .*r={room} fits"):
        script.shira_config(base).mask_fn(layer, 20)
    del base.model.layers[2]
    with pytest.raises(ValueError, match="14 of the 21 layers"):
        script.shira_config(base)


def test_shira_takes_linear_layers_only(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    for architecture, left in (("gpt2", 0), ("qwen3-moe", 15)):
        folder = tmp_path / architecture
        folder.mkdir()
        fisher = extract(checkpoint(architecture), prompts, folder / "f.safetensors", ExtractOptions(limit=1)).path
        path = mask(fisher, folder / "mask.safetensors", MaskOptions(train="top", keep=0.5)).path
        if not left:
            with pytest.raises(CheckpointError, match="no linear layer"):
                export(path, ExportOptions(to="peft-shira"))
            continue
        text = export(path, ExportOptions(to="peft-shira"))
        assert ".experts." not in text
        assert f"all {left} layers" in text


# What is refused


def test_what_a_tool_cannot_take_is_refused(tmp_path: Path) -> None:
    path = graded(tmp_path)
    (tmp_path / "layer_importance.json").write_text("[1.0, 2.0]")
    with pytest.raises(OptionError, match=r"--to.*peft-shira, axolotl, llamafactory, mergekit"):
        ExportOptions(to="unsloth")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"--learning-rate.*0 and 1"):
        ExportOptions(to="axolotl", learning_rate=0.0)
    with pytest.raises(OptionError, match="peft-shira needs a mask"):
        export(tmp_path / "layer_importance.json", ExportOptions(to="peft-shira"))
    with pytest.raises(CheckpointError, match=r"fisher.json: does not describe a mask"):
        export(tmp_path / "fisher.safetensors", ExportOptions(to="axolotl"))
    sub = mask(tmp_path / "fisher.safetensors", tmp_path / "s.safetensors", MaskOptions(svd_rank=2)).path
    with pytest.raises(CheckpointError, match=r"a subspace.*no other tool"):
        export(sub, ExportOptions(to="axolotl"))
    head = write(tmp_path / "h.safetensors", {"lm_head.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(CheckpointError, match=r"none.*in a layer"):
        export(mask(head, tmp_path / "g.safetensors", MaskOptions(preset="fggm")).path, ExportOptions(to="mergekit"))
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_export(path, tmp_path / "there.yaml", ExportOptions(to="mergekit"))
    with pytest.raises(OutputError, match="exists already"):
        write_export(path, path, ExportOptions(to="mergekit", force=True))
    write_export(path, tmp_path / "there.yaml", ExportOptions(to="mergekit", force=True))
    assert "task_arithmetic" in (tmp_path / "there.yaml").read_text()
