"""The examples run, as written, on a tiny model."""

import importlib
import importlib.util
import json
import os
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from safetensors.torch import load_file

import fisherkit
from fisherkit.training import MaskedUpdate

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = {
    "old": [("Name three rivers.", "Yes."), ("What is two plus two?", "Good morning."), ("No!", "Three rivers.")],
    "new": [("What is the capital?", "Yes."), ("Good morning to you all.", "Two plus two."), ("Yes.", "No!")],
}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with old.jsonl and new.jsonl, in which the example runs."""
    for name, questions in ROWS.items():
        text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in questions)
        (tmp_path / f"{name}.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [example, *map(os.fspath, map(str, arguments))])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


@pytest.mark.parametrize("kind", ["fggm", "random", "migu", "none"])
def test_mask_trainer(
    kind: str,
    checkpoint: Callable[[str], Path],
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = checkpoint("llama")
    options = ("--mask", kind, "--steps", 2, "--rate", 1e-2)
    run(monkeypatch, "mask_trainer.py", model, "new.jsonl", "out", *options)
    before, after = pairs.tensors(model), pairs.tensors(rows / "out" / "model")
    changed = {name: (before[name] != after[name]).any(-1) for name in before if before[name].ndim == 2}
    if kind in ("fggm", "random"):
        masks = fisherkit.load_mask(rows / "out" / "mask.safetensors")
        assert all(not (changed[name] & ~masks[name][:, 0]).any() for name in masks)
        assert "weights may change" in capsys.readouterr().out
    share = float(torch.cat([own for name, own in changed.items() if ".layers." in name]).float().mean())
    assert {"fggm": 0.2, "random": 0.2, "migu": 0.25, "none": 0.9}[kind] < share
    assert share < {"fggm": 0.31, "random": 0.31, "migu": 0.65, "none": 1.1}[kind]


def test_subspace_lora(checkpoint: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    options = ("--rank", 4, "--steps", 2)
    run(monkeypatch, "subspace_lora.py", checkpoint("llama"), "old.jsonl", "new.jsonl", "out", *options)
    assert (rows / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_shield_trainer(checkpoint: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pull it is plain fine-tuning; with one, less changes in the directions of the shield."""
    model = checkpoint("llama")
    moved = {}
    for pull in (20, 0):
        options = ("--steps", 3, "--rate", 1e-2, "--pull", pull)
        run(monkeypatch, "shield_trainer.py", model, "old.jsonl", "new.jsonl", f"out{pull}", *options)
        before, after = pairs.tensors(model), pairs.tensors(rows / f"out{pull}" / "model")
        shield = load_file(rows / "out20" / "shield.safetensors")
        changes = {name: (after[name] - before[name]).float() @ shield[f"{name}.V"] for name in shielded(shield)}
        moved[pull] = sum(float(change.square().sum()) for change in changes.values())
    assert 0 < moved[20] < 0.2 * moved[0]
    assert not (rows / "out0" / "shield.safetensors").exists()


def shielded(shield: dict[str, torch.Tensor]) -> list[str]:
    return [key.removesuffix(".V") for key in shield if key.endswith(".V")]


def test_layer_scale(checkpoint: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "layer_scale.py", checkpoint("llama"), "old.jsonl", "new.jsonl", "out", "--steps", 2)
    assert (rows / "out" / "model" / "config.json").is_file()


def test_repair(checkpoint: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = pairs.fine_tune(checkpoint("llama"), rows / "tuned")
    run(monkeypatch, "repair.py", checkpoint("llama"), tuned, "old.jsonl", "new.jsonl", "out")
    for strength in ("0.3", "1", "3"):
        assert (rows / "out" / f"repaired-{strength}" / "config.json").is_file()


def test_fggm_tasks(
    checkpoint: Callable[[str], Path],
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, "fggm_tasks.py", checkpoint("llama"), "out", "old.jsonl", "new.jsonl", "--steps", 2)
    assert capsys.readouterr().out.strip().endswith(str(Path("out") / "01-new" / "model"))
    assert (rows / "out" / "01-new" / "model" / "tokenizer.json").is_file()


def stand_in(monkeypatch: pytest.MonkeyPatch, path: str, **names: Any) -> None:
    """Put a module of that name in place where the real one is not installed; both are driven in the same way."""
    parts = path.split(".")
    if importlib.util.find_spec(parts[0]) is not None:
        return
    for number in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:number]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, value in names.items():
        setattr(sys.modules[path], name, value)


def test_axolotl_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic")
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "axolotl_mask", raising=False)
    module = importlib.import_module("axolotl_mask")
    plugin = module.MaskPlugin()
    module_name, _, options = plugin.get_input_args().rpartition(".")
    config = getattr(importlib.import_module(module_name), options)(fisherkit_mask="mask.safetensors")
    (callback,) = plugin.add_callbacks_post_trainer(config, None)
    assert isinstance(callback, MaskedUpdate)


def test_llamafactory_mask(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("yaml")
    seen: dict[str, Any] = {}

    def run_exp(args: dict[str, Any], callbacks: list[Any]) -> None:
        seen.update(args, callbacks=callbacks)

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    if not hasattr(sys.modules.get("llamafactory.train.tuner"), "run_exp"):
        monkeypatch.setattr("llamafactory.train.tuner.run_exp", run_exp)
    (rows / "config.yaml").write_text("finetuning_type: full\n")
    run(monkeypatch, "llamafactory_mask.py", "config.yaml", "mask.safetensors")
    assert seen["finetuning_type"] == "full"
    assert [type(callback) for callback in seen["callbacks"]] == [MaskedUpdate]


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text()
    assert all(path.stem in text or path.stem == "common" for path in EXAMPLES.glob("*.py"))
