"""peft's SHiRA trains exactly as many entries as a mask lets change; what a tool cannot take is refused."""

import ast
import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from export_masks import graded
from mask_oracle import read_masks, write
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import fisherkit
from fisherkit import MaskOptions, extract, mask
from fisherkit.errors import CheckpointError, OptionError, OutputError
from fisherkit.methods.export.configs import export, write_export
from fisherkit.options import ExportOptions, ExtractOptions

Checkpoint = Callable[[str], Path]


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
    with pytest.raises(CheckpointError, match="7 of 21 weights are not in this model"):
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


def test_shira_leaves_embeddings_out_and_says_so(tmp_path: Path) -> None:
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    graded(tmp_path, outside=outside)
    path = mask(tmp_path / "fisher.safetensors", tmp_path / "m.safetensors", MaskOptions(train="top", keep=0.9)).path
    text = export(path, ExportOptions(to="peft-shira"))
    assert "'lm_head.weight'" in text
    assert "'model.embed_tokens.weight'" not in text
    assert "1 weights of the mask are embeddings" in text


def test_the_script_imports_public_names_only(llama_mask: Path) -> None:
    text = export(llama_mask, ExportOptions(to="peft-shira"))
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imports if isinstance(node, ast.ImportFrom) and "fisherkit" in (node.module or "")]
    used = set(re.findall(r"fisherkit\.(\w+)", text))
    assert used == {"load_mask", "find_weights"}
    assert used <= set(fisherkit.__all__)


def test_the_script_finds_its_mask_from_where_it_lies(llama_mask: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for file in (llama_mask, llama_mask.with_suffix(".json")):
        shutil.copy(file, tmp_path / "masks")
    write_export(tmp_path / "masks" / llama_mask.name, tmp_path / "shira.py", ExportOptions(to="peft-shira"))
    assert str(tmp_path) not in (tmp_path / "shira.py").read_text()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("masks", "shira.py"):
        shutil.move(tmp_path / name, moved / name)
    assert len(fisherkit.load_mask(imported(moved / "shira.py").MASK)) == 21


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
    for own in (path, path.with_suffix(".json")):
        with pytest.raises(OutputError, match="is the mask itself, or what describes it"):
            write_export(path, own, ExportOptions(to="mergekit", force=True))
    write_export(path, tmp_path / "there.yaml", ExportOptions(to="mergekit", force=True))
    assert "task_arithmetic" in (tmp_path / "there.yaml").read_text()
