"""Settings for axolotl, LLaMA-Factory and mergekit mean there what they mean here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_masks import densities, graded
from mask_oracle import read_masks

from fisherkit import MaskOptions, mask
from fisherkit.errors import CheckpointError
from fisherkit.methods.export.configs import export
from fisherkit.options import ExportOptions

SILENT = ("model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def exported(path: Path, to: str, **options: Any) -> dict[str, Any]:
    found = yaml.safe_load(export(path, ExportOptions(to=to, **options)))  # type: ignore[arg-type]
    assert isinstance(found, dict)
    return found


def config_of(folder: Path, layers: int) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": layers}}))
    return str(folder)


# mergekit


def merge_weight(config: dict[str, Any], name: str, layers: int) -> float:
    """What mergekit does with a tensor: the first filter that its name contains; a list spread evenly over the layers,
    of which the first entry goes to what lies in no layer."""
    match = re.search(r"layers\.(\d+)\.", name)
    at = int(match[1]) / (layers - 1) if match else 0.0
    setting = config["models"][0]["parameters"]["weight"]
    value = next(entry["value"] for entry in setting if entry.get("filter", "") in name)
    if not isinstance(value, list):
        return float(value)
    place = at * (len(value) - 1)
    low = int(place)
    high = min(low + 1, len(value) - 1)
    return float(value[low] + (place - low) * (value[high] - value[low]))


@pytest.mark.parametrize("layers", [12, 5, 3])
def test_mergekit_weighs_every_layer_by_its_density_and_the_silent_ones_fully(layers: int, tmp_path: Path) -> None:
    path = graded(tmp_path, layers)
    config, shares = exported(path, "mergekit", tuned="org/tuned"), densities(path)
    assert config["base_model"] == "org/tiny"
    assert config["models"][0]["model"] == "org/tuned"
    for layer in range(12):
        weight = merge_weight(config, f"model.layers.{layer}.mlp.up_proj.weight", 12)
        assert weight == pytest.approx(shares.get(layer, 1.0), abs=1e-6), layer
    assert exported(path, "mergekit", base="x: y")["base_model"] == "x: y"


def test_mergekit_takes_what_lies_in_no_layer_by_its_own_share(tmp_path: Path) -> None:
    path = graded(tmp_path, outside=("lm_head.weight", "model.embed_tokens.weight"))
    config, flags = exported(path, "mergekit"), read_masks(path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert merge_weight(config, name, 12) == pytest.approx(flags[name].mean(), abs=1e-6)
    for name in ("model.norm.weight", "lm_head.bias"):
        assert merge_weight(config, name, 12) == 1.0
    silent = exported(graded(tmp_path), "mergekit")
    assert all(merge_weight(silent, name, 12) == 1.0 for name in SILENT[1:])


def test_mergekit_itself_reads_the_settings_so(tmp_path: Path) -> None:
    mergekit = pytest.importorskip("mergekit.config")
    path = graded(tmp_path, 5, outside=("lm_head.weight",))
    setting = mergekit.MergeConfiguration.model_validate(exported(path, "mergekit")).models[0].parameters["weight"]
    for name in (*(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12)), *SILENT[1:]):
        match = re.search(r"layers\.(\d+)\.", name)
        found = mergekit.evaluate_setting(name, setting, int(match[1]) / 11 if match else 0, validate=float)
        assert found == pytest.approx(merge_weight(exported(path, "mergekit"), name, 12), abs=1e-9), name


@pytest.mark.parametrize("to", ["mergekit", "llamafactory"])
def test_the_number_of_layers_is_asked_for_where_nothing_tells_it(to: str, tmp_path: Path) -> None:
    importance = tmp_path / "layer_importance.json"
    importance.write_text(json.dumps({"0": 1.0, "1": 4.0, "2": 1.0}))
    for source in (importance, graded(tmp_path, of=None)):
        with pytest.raises(CheckpointError, match=f"how many layers.*{to}.*--base"):
            exported(source, to)
    assert exported(importance, to, base=config_of(tmp_path / "three", 3))
    with pytest.raises(CheckpointError, match="speaks of layer 2, and the model has 2 layers"):
        exported(importance, to, base=config_of(tmp_path / "two", 2))


def test_layer_importance_asks_the_fisher_beside_it(tmp_path: Path) -> None:
    graded(tmp_path, 3, of=4)
    importance = tmp_path / "layer_importance.json"
    rows = [{"layer": n, "name": f"model.layers.{n}", "mean": mean} for n, mean in enumerate((1.0, 4.0, 1.0))]
    importance.write_text(json.dumps({"model": "org/tiny", "fisher": "fisher.safetensors", "layers": rows}))
    config = exported(importance, "mergekit")
    weights = [merge_weight(config, f"model.layers.{layer}.mlp.up_proj.weight", 4) for layer in range(4)]
    assert weights == [1.0, 0.5, 1.0, 1.0]


# axolotl


def trained_by_axolotl(config: dict[str, Any], name: str) -> bool:
    """Dots in a pattern are literal; without patterns everything is trained."""
    if "unfrozen_parameters" not in config:
        return True
    patterns = [re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)) for pattern in config["unfrozen_parameters"]]
    assert not any(re.search(r"\[[0-9]*:?[0-9]*\]$", pattern) for pattern in config["unfrozen_parameters"])
    return any(pattern.match(name) for pattern in patterns)


def test_axolotl_freezes_what_may_not_change_and_nothing_that_the_mask_is_silent_about(tmp_path: Path) -> None:
    path = graded(tmp_path)
    config, flags = exported(path, "axolotl", learning_rate=2e-5), read_masks(path)
    for name in (*flags, *SILENT):
        assert trained_by_axolotl(config, name) == (name not in flags or bool(flags[name].any())), name
    assert any(not flag.any() for flag in flags.values())


def test_axolotl_freezes_nothing_where_every_weight_may_change_in_part(tmp_path: Path) -> None:
    graded(tmp_path)
    path = mask(tmp_path / "fisher.safetensors", tmp_path / "rows.safetensors", MaskOptions(preset="fggm")).path
    text = export(path, ExportOptions(to="axolotl"))
    assert "unfrozen_parameters" not in text
    assert "none is frozen" in text


def test_axolotl_rates_follow_the_density_and_layer_1_is_not_layer_10(tmp_path: Path) -> None:
    path = graded(tmp_path)
    config, shares = exported(path, "axolotl", learning_rate=2e-5), densities(path)
    rates = {module: group["lr"] for group in config["lr_groups"] for module in group["modules"]}
    assert config["learning_rate"] == 2e-5
    for layer, share in shares.items():
        found = [rate for module, rate in rates.items() if module in f"model.layers.{layer}.mlp.up_proj.weight"]
        assert found == ([pytest.approx(2e-5 * share / max(shares.values()), rel=1e-4)] if share else [])


# LLaMA-Factory


def test_llamafactory_trains_as_many_layers_at_the_better_end(tmp_path: Path) -> None:
    path = graded(tmp_path)
    config = exported(path, "llamafactory")
    assert config["finetuning_type"] == "freeze"
    assert config["freeze_trainable_layers"] == round(sum(densities(path).values()))
    assert config["freeze_trainable_modules"] == "mlp"
    first = tmp_path / "layer_importance.json"
    first.write_text(json.dumps([1.0, 1.0, 1.0, 100.0, 100.0]))
    base = config_of(tmp_path / "five", 5)
    assert exported(first, "llamafactory", base=base)["freeze_trainable_layers"] == -3
    assert exported(first, "llamafactory", base=base)["freeze_trainable_modules"] == "all"


def test_llamafactory_does_not_take_the_ends_of_a_mask_for_those_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="silent about layer 3 of 12"):
        exported(graded(tmp_path, 3), "llamafactory")
