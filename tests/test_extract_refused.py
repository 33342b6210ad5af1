"""What ``extract`` refuses before its work: outputs that are inputs, configs and checkpoints that do not fit."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch

import fisherkit
from fisherkit.errors import CheckpointError, FisherkitError, OptionError, OutputError
from fisherkit.options import ExtractOptions, parse_layers

Checkpoint = Callable[[str], Path]


def copy(model: Path, folder: Path, changes: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """A checkpoint as one file, its config changed, tensors added."""
    folder.mkdir()
    held = {}
    for shard in model.glob("*.safetensors"):
        held.update(safetensors.torch.load_file(shard))
    safetensors.torch.save_file({**held, **tensors}, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    config = json.loads((model / "config.json").read_text()) | (changes or {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Outputs that are inputs


@pytest.mark.parametrize(
    "name",
    ["m/model.safetensors", "m/fisher.pt", "m/deeper/fisher.pt", "m", "link.safetensors", "linked/f.pt", "weights.pt"],
)
def test_an_output_in_the_place_of_the_model_is_refused(
    name: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "m")
    (model / "deeper").mkdir()
    (tmp_path / "link.safetensors").symlink_to(model / "model.safetensors")
    (tmp_path / "linked").symlink_to(model)
    (model / "model.safetensors").rename(tmp_path / "weights.pt")
    (model / "model.safetensors").symlink_to(tmp_path / "weights.pt")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"input|does not replace"):
        fisherkit.extract(model, prompts, tmp_path / name, ExtractOptions(force=True))
    assert snapshot(tmp_path) == before


def test_files_beside_an_output_do_not_replace_prompts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in ("prompts.json", "layer_importance.json"):
        path = tiny.write_prompts(tmp_path / name.replace(".json", ".jsonl")).rename(tmp_path / name)
        path.write_text(json.dumps({"fisher": "prompts.pt", "file": "prompts.pt", "data": [{"prompt": "Yes."}]}))
        with pytest.raises(FisherkitError, match=name):
            fisherkit.extract(checkpoint("llama"), path, tmp_path / "prompts.pt", ExtractOptions(force=True))
        assert json.loads(path.read_text())["fisher"] == "prompts.pt"


def test_a_model_inside_of_the_output_is_refused(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    model = copy(checkpoint("llama"), tmp_path / "out.partial" / "m")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="input"):
        fisherkit.extract(model, prompts, tmp_path / "out")
    assert snapshot(tmp_path) == before


# Checkpoints that hold more than their config tells of


def test_a_config_with_fewer_layers_than_the_checkpoint_is_refused(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "m", {"num_hidden_layers": 2})
    with pytest.raises(CheckpointError, match=r"of the 2 layers .* model\.layers\.2\.") as caught:
        fisherkit.extract(model, prompts, tmp_path / "fisher.pt")
    assert "9 tensors" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_block_tensor_without_a_parameter_is_refused(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    odd = {"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}
    model = copy(checkpoint("llama"), tmp_path / "m", **odd)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.q_norm\.weight"):
        fisherkit.extract(model, prompts, tmp_path / "fisher.pt")


@pytest.mark.parametrize(
    ("architecture", "config", "tensors"),
    [
        ("llama", {}, ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("llama", {"num_nextn_predict_layers": 1}, ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.up.weight"]),
        ("gpt2", {}, ["transformer.h.0.attn.bias", "transformer.h.2.attn.masked_bias"]),
        ("gpt-neox", {}, ["gpt_neox.layers.1.attention.bias", "gpt_neox.layers.1.attention.masked_bias"]),
        ("llama", {}, ["vision.blocks.0.weight", "model.extra.weight"]),
    ],
)
def test_what_transformers_ignores_by_rule_is_ignored(
    architecture: str, config: dict[str, Any], tensors: list[str], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = copy(checkpoint(architecture), tmp_path / "m", config, **{name: torch.ones(3) for name in tensors})
    plain = fisherkit.plan_extract(checkpoint(architecture), None)
    assert fisherkit.plan_extract(model, None)["parameters"] == plain["parameters"]


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_no_checkpoint_that_transformers_saves_has_a_tensor_too_many(architecture: str, checkpoint: Checkpoint) -> None:
    assert fisherkit.plan_extract(checkpoint(architecture), None)["targets"] > 0


# Configs


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"num_experts": 10**8}, "num_experts"),
        ({"hidden_size": "x"}, "config.json"),
        ({"hidden_size": 2**62}, "config.json"),
        ({"vocab_size": -5}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"rope_parameters": 7}, "config.json"),
    ],
)
def test_configs_that_make_no_model_are_refused_at_once(
    change: dict[str, Any], what: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "m", change)
    started = time.monotonic()
    for call in (
        lambda: fisherkit.plan_extract(model, prompts),
        lambda: fisherkit.extract(model, prompts, tmp_path / "fisher.pt"),
    ):
        with pytest.raises(FisherkitError, match=what):
            call()
    assert time.monotonic() - started < 20
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[1]", '{"model_type": "no-such"}', '{"a": 1e999}'])
def test_broken_configs_are_one_line(content: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = copy(checkpoint("llama"), tmp_path / "m")
    (model / "config.json").write_text(content)
    with pytest.raises(FisherkitError) as caught:
        fisherkit.extract(model, prompts, tmp_path / "fisher.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "{", "[" * 100_000, '{"model": {"type": "BPE", "vocab": 3}}'])
def test_broken_tokenizers_are_one_line(content: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = copy(checkpoint("llama"), tmp_path / "m")
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(FisherkitError, match="tokenizer"):
        fisherkit.extract(model, prompts, tmp_path / "fisher.pt")
    assert fisherkit.plan_extract(model, prompts)["samples"] is None


# What a refusal leaves behind


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_a_refused_run_leaves_no_work_folder(name: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    shape = (48, 32) if "mlp" in name else (tiny.VOCABULARY, 32)
    model = copy(checkpoint("llama"), tmp_path / "m", **{name: torch.full(shape, torch.nan)})
    with pytest.raises(CheckpointError, match=name):
        fisherkit.extract(model, prompts, tmp_path / "fisher.pt", ExtractOptions(group_size=1))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# Options and the first moments


@pytest.mark.parametrize("text", ["0-9999999999", "0-10001", "99999999999999999999", "1," + "9" * 5000])
def test_layers_beyond_every_model_take_no_memory(text: str) -> None:
    with pytest.raises(OptionError, match="layers") as caught:
        parse_layers(text)
    assert len(str(caught.value)) < 300


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_while_the_commands_are_imported_is_one_line() -> None:
    code = (
        "import os, signal, sys, importlib.abc\n"
        "class Press(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        name == 'fisherkit.cli.mask' and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
        "from fisherkit.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
