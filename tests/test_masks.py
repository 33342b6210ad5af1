"""Masks of a Fisher are those of the definition, worked out the slow way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fisher_files import write_fisher
from mask_oracle import aggregated, assert_same, fisher_arrays, made, spread, top, write
from safetensors.torch import load_file

from fisherkit import MaskOptions, extract, load_mask, mask
from fisherkit.checkpoint.names.axes import AxisFinder
from fisherkit.options import ExtractOptions
from fisherkit.pairs import ranking

Q, DOWN, NORM, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "input_layernorm",
    "lm_head",
)
Checkpoint = Callable[[str], Path]


# The definition


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("combine", ["sum", "mean", "max"])
@pytest.mark.parametrize(("aggregate", "axis"), [("input", 1), ("output", 0)])
def test_units_are_ranked_by_their_combined_scores(
    scope: str, combine: str, aggregate: str, axis: int, tmp_path: Path
) -> None:
    arrays = fisher_arrays()
    found = made(tmp_path, arrays, train="top", keep=0.3, aggregate=aggregate, combine=combine, scope=scope)
    assert_same(found, spread(top(aggregated(arrays, axis, combine), "0.3", scope), arrays, axis))


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("keep", [0.001, 0.1, 0.3, 0.999])
def test_entries_are_ranked_one_by_one(scope: str, keep: float, tmp_path: Path) -> None:
    arrays = fisher_arrays()
    found = made(tmp_path, arrays, train="top", keep=keep, aggregate="none", scope=scope)
    assert_same(found, top({name: a.astype(np.float64) for name, a in arrays.items()}, str(keep), scope))


@pytest.mark.parametrize("aggregate", ["input", "none"])
def test_protect_freezes_what_train_frees(aggregate: str, tmp_path: Path) -> None:
    arrays = fisher_arrays()
    free = made(tmp_path, arrays, train="top", keep=0.3, aggregate=aggregate)
    frozen = made(tmp_path, arrays, protect="top", keep=0.3, aggregate=aggregate, force=True)
    assert_same(frozen, {name: ~flags for name, flags in free.items()})


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7, 0.29, 0.57])
def test_counts_are_exact_for_decimal_shares(keep: float, tmp_path: Path) -> None:
    arrays = {"model.layers.0.mlp.up_proj.weight": np.ones((1000, 3), np.float32)}
    found = made(tmp_path, arrays, train="top", keep=keep)
    assert found["model.layers.0.mlp.up_proj.weight"].sum() == 3 * round(1000 * keep)


@pytest.mark.parametrize("aggregate", ["input", "none"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_equal_scores_go_by_index(aggregate: str, scope: str, tmp_path: Path) -> None:
    arrays = {f"model.layers.{n}.mlp.up_proj.weight": np.ones((10, 4), np.float32) for n in range(2)}
    first, second = made(tmp_path, arrays, train="top", keep=0.5, aggregate=aggregate, scope=scope).values()
    assert first.reshape(-1)[: 20 if scope == "tensor" else 40].all()
    assert first.sum() + second.sum() == 40
    assert second.sum() == (20 if scope == "tensor" else 0)


@pytest.mark.parametrize(
    "options", [{"aggregate": a, "scope": s} for a in ("input", "output", "none") for s in ("tensor", "global")]
)
def test_the_size_of_blocks_does_not_matter(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = fisher_arrays()
    whole = made(tmp_path, arrays, protect="top", **options)
    monkeypatch.setattr(ranking, "BLOCK", 16)
    monkeypatch.setattr(ranking, "_AT_ONCE", 2)
    assert_same(made(tmp_path, arrays, protect="top", force=True, **options), whole)


@pytest.mark.parametrize("aggregate", ["input", "none"])
def test_the_kind_of_file_does_not_matter(aggregate: str, tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(a).bfloat16() for name, a in fisher_arrays().items()}
    masks = []
    for name in ("fisher.pt", "fisher.safetensors", "fisher"):
        (tmp_path / name[-3:]).mkdir()
        fisher = write_fisher(tmp_path / name[-3:] / name, tensors, statistics=False)
        options = MaskOptions(train="top", aggregate=aggregate, scope="global")  # type: ignore[arg-type]
        masks.append(mask(fisher, tmp_path / name[-3:] / "mask.safetensors", options))
    assert len({report.path.read_bytes() for report in masks}) == 1


def test_what_is_written_is_what_is_reported_and_loaded(tmp_path: Path) -> None:
    arrays = fisher_arrays()
    fisher = write(tmp_path / "fisher.safetensors", arrays, architecture="LlamaForCausalLM")
    report = mask(fisher, tmp_path / "mask.safetensors", MaskOptions(protect="top", keep=0.3))
    flags = load_mask(report.path)
    kept = sum(int(flag.expand(arrays[name].shape).sum()) for name, flag in flags.items())
    assert report.kept == kept
    assert report.density == kept / report.weights
    assert (report.direction, report.kind, report.tensors) == ("protect", "mask", len(arrays))
    assert report.files == (report.path, tmp_path / "mask.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fisher.json",
        "fisher.safetensors",
        "mask.json",
        "mask.safetensors",
    ]
    assert load_file(report.path)[Q].shape == (12,)


# Published choices


def test_fggm_trains_rows_above_the_seventy_percent_quantile(tmp_path: Path) -> None:
    arrays = fisher_arrays(rounded=False)
    found = made(tmp_path, arrays, preset="fggm")
    for name in (Q, DOWN):
        sums = arrays[name].astype(np.float64).sum(axis=1)
        kept = np.sort(sums)[::-1][: int(0.3 * len(sums))]
        assert (found[name][:, 0] == (sums >= kept.min())).all()


def test_fish_trains_half_a_percent_of_all_entries(tmp_path: Path) -> None:
    arrays = fisher_arrays()
    found = made(tmp_path, arrays, preset="fish")
    assert sum(int(flags.sum()) for flags in found.values()) == int(0.005 * sum(a.size for a in arrays.values()))


def test_ssu_freezes_the_better_half_of_the_columns(tmp_path: Path) -> None:
    arrays = fisher_arrays(rounded=False)
    found = made(tmp_path, arrays, preset="ssu")
    sums = arrays[DOWN].sum(axis=0)
    assert (found[DOWN] == (sums < np.sort(sums)[15])).all()


def test_what_is_given_wins_over_the_preset() -> None:
    chosen = MaskOptions(preset="fggm", keep=0.5, protect="top").selection
    assert (chosen.direction, float(chosen.keep), chosen.aggregate, chosen.scope) == ("protect", 0.5, "input", "tensor")
    assert MaskOptions(preset="fish", scope="layer").selection.scope == "layer"


# Which axis is the input


@pytest.mark.parametrize(
    ("name", "shapes", "architecture", "axes"),
    [
        ("h.0.attn.c_attn.weight", {"h.0.attn.c_attn.weight": (8, 24)}, "", (0, 1)),
        ("h.0.mlp.c_proj.weight", {"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_proj.weight": (32, 8)}, "", (0, 1)),
        ("h.0.mlp.c_proj.weight", {"h.0.attn.c_attn.weight": (24, 8), "h.0.mlp.c_proj.weight": (8, 32)}, "", (1, 0)),
        ("h.0.mlp.c_proj.weight", {"h.0.mlp.c_proj.weight": (32, 8)}, "GPT2LMHeadModel", (0, 1)),
        ("h.0.mlp.c_proj.weight", {"h.0.mlp.c_proj.weight": (32, 8)}, "Starcoder2ForCausalLM", (1, 0)),
        ("wte.weight", {"h.0.attn.c_attn.weight": (8, 24), "wte.weight": (50, 8)}, "GPT2LMHeadModel", (1, 0)),
        ("m.experts.down_proj", {"m.experts.gate_up_proj": (4, 12, 8), "m.experts.down_proj": (4, 8, 6)}, "", (2, 1)),
        ("m.experts.down_proj", {"m.experts.gate_up_proj": (4, 8, 12), "m.experts.down_proj": (4, 6, 8)}, "", (1, 2)),
        ("m.experts.down_proj", {"m.experts.down_proj": (4, 6, 8)}, "GptOssForCausalLM", (1, 2)),
        ("m.experts.down_proj", {"m.experts.down_proj": (4, 6, 8)}, "Qwen3MoeForCausalLM", (2, 1)),
        ("m.experts.gate_up_proj_bias", {"m.experts.gate_up_proj_bias": (4, 12)}, "GptOssForCausalLM", None),
        ("mixer.conv1d.weight", {"mixer.conv1d.weight": (8, 1, 4)}, "", None),
        ("patch.weight", {"patch.weight": (8, 3, 4, 4)}, "", None),
        ("norm.weight", {"norm.weight": (8,)}, "", None),
    ],
)
def test_input_means_input(
    name: str, shapes: dict[str, tuple[int, ...]], architecture: str, axes: tuple[int, int] | None
) -> None:
    assert AxisFinder(shapes, architecture).axes(name) == axes


@pytest.mark.parametrize(
    ("architecture", "suffix", "over"),
    [
        ("llama", "self_attn.q_proj.weight", 1),
        ("gpt2", "attn.c_attn.weight", 0),
        ("gpt2", "mlp.c_proj.weight", 0),
        ("qwen3-moe", "mlp.experts.0.gate_proj.weight", 1),
        ("gemma4-moe", "experts.gate_up_proj", 2),
        ("gemma4-31b", "self_attn.q_proj.weight", 1),
    ],
)
def test_rows_of_real_models_are_outputs(
    architecture: str, suffix: str, over: int, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    fisher = extract(checkpoint(architecture), prompts, tmp_path / "fisher.safetensors", ExtractOptions(limit=2)).path
    report = mask(fisher, tmp_path / "mask.safetensors", MaskOptions(preset="fggm"))
    tensors, flags = load_file(fisher), load_file(report.path)
    assert tensors.keys() == flags.keys()
    names = [name for name in tensors if name.endswith(suffix)]
    assert names
    for name in names:
        sums = tensors[name].double().sum(dim=over)
        count = int(0.3 * sums.numel())
        assert int(flags[name].sum()) == count
        assert sums[flags[name]].min() >= sums[~flags[name]].max()


def test_vectors_and_biases_are_ranked_by_entry(tmp_path: Path) -> None:
    arrays = {
        "a.norm.weight": np.arange(10, dtype=np.float32),
        "a.experts.up_bias": np.arange(20, dtype=np.float32).reshape(2, 10),
    }
    found = made(tmp_path, arrays, train="top", keep=0.3)
    assert np.flatnonzero(found["a.norm.weight"]).tolist() == [7, 8, 9]
    assert np.flatnonzero(found["a.experts.up_bias"]).tolist() == list(range(14, 20))
