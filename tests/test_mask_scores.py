"""Scores that look at more than one Fisher, and Fishers whose masks could not be trusted."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_oracle import aggregated, assert_same, fisher_arrays, made, read_masks, spread, top, write

from fisherkit import MaskOptions, inspect, mask
from fisherkit.errors import CheckpointError, OptionError, OutputError
from fisherkit.kernels.mask_scores import coarse_counts, coarse_range, coarse_threshold, is_coarse

Q, DOWN, NORM, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "input_layernorm",
    "lm_head",
)

# What is ranked

SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "magnitude": lambda f, w: abs(w),
    "fisher-weight": lambda f, w: f * w * w,
    "gallop": lambda f, w: np.sqrt(f) / np.maximum(abs(w), np.finfo(np.float32).tiny),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("aggregate", ["input", "none"])
def test_scores_that_look_at_the_weights(score: str, aggregate: str, tmp_path: Path) -> None:
    arrays = fisher_arrays(rounded=False)
    generator = np.random.default_rng(1)
    weights = {name: generator.standard_normal(a.shape).astype(np.float32) for name, a in arrays.items()}
    checkpoint = write(tmp_path / "model.safetensors", weights)
    found = made(tmp_path, arrays, train="top", keep=0.3, aggregate=aggregate, score=score, weights=checkpoint)
    scores = {name: SCORES[score](a.astype(np.float64), weights[name].astype(np.float64)) for name, a in arrays.items()}
    if aggregate == "none":
        assert_same(found, top(scores, "0.3", "tensor"))
    else:
        assert_same(
            found,
            spread(top({n: s.sum(1) if s.ndim > 1 else s for n, s in scores.items()}, "0.3", "tensor"), arrays, 1),
        )


def test_gallop_ranks_a_weight_of_zero_first_and_one_without_gradient_last(tmp_path: Path) -> None:
    fisher = {"a.weight": np.array([[1, 1, 0, 4]], np.float32)}
    checkpoint = write(tmp_path / "m.safetensors", {"a.weight": np.array([[0, 1, 0, 1]], np.float32)})
    options = {"train": "top", "aggregate": "none", "score": "gallop", "weights": str(checkpoint)}
    assert made(tmp_path, fisher, keep=0.25, **options)["a.weight"].tolist() == [[True, False, False, False]]
    assert made(tmp_path, fisher, keep=0.75, force=True, **options)["a.weight"].tolist() == [[True, True, False, True]]


def test_weights_may_be_laid_out_in_another_way(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    gate_up, down = generator.random((2, 12, 8)).astype(np.float32), generator.random((2, 8, 6)).astype(np.float32)
    stem = "model.layers.0.mlp.experts"
    apart = {f"{stem}.{e}.down_proj.weight": down[e] for e in range(2)}
    for half, kind in ((slice(0, 6), "gate_proj"), (slice(6, 12), "up_proj")):
        apart |= {f"{stem}.{e}.{kind}.weight": np.ascontiguousarray(gate_up[e, half]) for e in range(2)}
    fused = {
        f"model.language_model.layers.0.mlp.experts.{k}": a for k, a in (("gate_up_proj", gate_up), ("down_proj", down))
    }
    fisher = {name: np.ones_like(a) for name, a in apart.items()}
    options = {"train": "top", "aggregate": "none", "scope": "global", "score": "magnitude"}
    one = made(tmp_path, fisher, weights=str(write(tmp_path / "apart.safetensors", apart)), **options)
    two = made(tmp_path, fisher, weights=str(write(tmp_path / "fused.safetensors", fused)), force=True, **options)
    assert_same(two, one)


CONTRASTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ratio": lambda f, g: f / np.maximum(g, 1e-6),
    "difference": lambda f, g: f - g,
    "relu-difference": lambda f, g: np.maximum(f - g, 0),
}


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("aggregate", ["input", "none"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_two_fishers_are_contrasted_by_their_own_means(
    contrast: str, aggregate: str, scale: float, tmp_path: Path
) -> None:
    arrays, other = fisher_arrays(rounded=False), fisher_arrays(seed=5, rounded=False)
    against = write(tmp_path / "other.safetensors", {name: a * np.float32(scale) for name, a in other.items()})
    options = {"train": "top", "scope": "global", "aggregate": aggregate, "keep": 0.2}
    found = made(tmp_path, arrays, against=against, contrast=contrast, **options)
    mean_f, mean_g = (
        np.concatenate([a.ravel() for a in one.values()]).astype(np.float64).mean() for one in (arrays, other)
    )
    units = (
        (lambda one: aggregated(one, 1))
        if aggregate == "input"
        else (lambda one: {n: a.astype(np.float64) for n, a in one.items()})
    )
    f, g = units(arrays), units(other)
    flags = top({name: CONTRASTS[contrast](f[name] / mean_f, g[name] / mean_g) for name in f}, "0.2", "global")
    assert_same(found, spread(flags, arrays, 1) if aggregate == "input" else flags)


def test_random_masks_have_the_same_density_and_a_seed(tmp_path: Path) -> None:
    arrays = fisher_arrays()
    for aggregate in ("input", "output", "none"):
        options = {"train": "top", "keep": 0.3, "aggregate": aggregate, "force": True}
        real, one = made(tmp_path, arrays, **options), made(tmp_path, arrays, score="random", seed=1, **options)
        again, other = (made(tmp_path, arrays, score="random", seed=seed, **options) for seed in (1, 2))
        assert [f.sum() for f in one.values()] == [f.sum() for f in real.values()]
        assert_same(again, one)
        assert any((other[name] != one[name]).any() for name in one)


def test_a_random_mask_does_not_depend_on_the_other_tensors(tmp_path: Path) -> None:
    arrays = fisher_arrays()
    options = {"train": "top", "score": "random", "aggregate": "none"}
    whole = made(tmp_path, arrays, **options)
    alone = made(tmp_path, {Q: arrays[Q]}, force=True, **options)
    assert (alone[Q] == whole[Q]).all()


def test_random_entries_differ_from_block_to_block(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    found = made(tmp_path, {name: np.ones((3, 1 << 18), np.float32)}, train="top", score="random", aggregate="none")[
        name
    ]
    assert abs(found.mean(axis=1) - 0.3).max() < 0.01
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("values", ["normal", "bfloat16", "signed", "zeros", "equal", "huge"])
def test_a_coarse_bracket_holds_the_threshold(values: str) -> None:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal(5000).astype(np.float32)
    scores = {
        "normal": scores**2,
        "bfloat16": (np.abs(scores).view(np.uint32) & 0xFFFF0000).view(np.float32),
        "signed": scores,
        "zeros": np.where(scores > 1, scores, np.float32(0)),
        "equal": np.full(5000, 3, np.float32),
        "huge": np.where(scores > 2, np.float32(3.4028235e38), scores),
    }[values]
    for wanted in (1, 2, 100, 2500, 4999, 5000):
        found, threshold = coarse_range(coarse_counts(scores), wanted), np.sort(scores)[::-1][wanted - 1]
        assert found.low <= threshold <= found.high


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.sampled_from([0.0, -0.0, 1e-40, 1.0, 1.5, 2.0, -1.0, -3.0, 3e38, np.inf, -np.inf]), min_size=1),
    fill=st.integers(0, 40),
    share=st.floats(0, 1),
)
def test_the_threshold_of_coarse_scores_is_that_of_sorting_them(numbers: list[float], fill: int, share: float) -> None:
    wide = np.array([*numbers, *np.random.default_rng(fill).standard_normal(fill)], np.float32)
    scores = (wide.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert is_coarse(scores)
    wanted = max(1, int(share * scores.size))
    at = np.sort(scores)[::-1][wanted - 1]
    found = coarse_threshold(coarse_counts(scores), wanted)
    if found is None:
        assert at == 0 or np.isinf(scores).any()
    else:
        assert found.at == at
        assert found.ties == wanted - np.count_nonzero(scores > at)


def test_scores_with_fine_bits_are_not_coarse() -> None:
    for scores, coarse in (([], True), ([1.0, 2.0], True), ([1.0, 1.1], False), ([0.0, 1e-45], False)):
        assert is_coarse(np.array(scores, np.float32)) == coarse


# What cannot be trusted


@pytest.mark.parametrize("aggregate", ["input", "output", "none"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_no_fisher_has_are_named(aggregate: str, value: float, tmp_path: Path) -> None:
    arrays = fisher_arrays()
    arrays[DOWN][2, 5] = value
    with pytest.raises(CheckpointError, match=r"fisher.safetensors: model.layers.0.mlp.down_proj.weight .*index 65\b"):
        made(tmp_path, arrays, train="top", aggregate=aggregate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fisher.safetensors"]


@pytest.mark.parametrize("aggregate", ["input", "none"])
def test_a_fisher_of_zeros_is_refused(aggregate: str, tmp_path: Path) -> None:
    arrays = {name: np.zeros_like(a) for name, a in fisher_arrays().items()}
    with pytest.raises(CheckpointError, match="every entry is zero"):
        made(tmp_path, arrays, train="top", aggregate=aggregate)
    with pytest.raises(CheckpointError, match="every entry is zero"):
        made(
            tmp_path,
            fisher_arrays(),
            train="top",
            against=write(tmp_path / "zero.safetensors", arrays),
            aggregate=aggregate,
        )


@pytest.mark.parametrize("aggregate", ["input", "output", "none"])
@pytest.mark.parametrize("fused", [True, False])
def test_an_expert_that_no_token_reached_is_reported_apart(aggregate: str, fused: bool, tmp_path: Path) -> None:
    experts = np.random.default_rng(0).random((4, 8, 6)).astype(np.float32)
    experts[2] = 0
    stem = "model.layers.0.mlp.experts"
    arrays = {f"{stem}.down_proj": experts} if fused else {f"{stem}.{e}.down_proj.weight": experts[e] for e in range(4)}
    fisher = write(tmp_path / "fisher.safetensors", arrays)
    report = mask(fisher, tmp_path / "m.safetensors", MaskOptions(train="top", keep=0.5, aggregate=aggregate))  # type: ignore[arg-type]
    assert report.unreached == (f"{stem}.down_proj[2]" if fused else f"{stem}.2.down_proj.weight",)
    assert "not unimportance but no measurement (no token got there)" in report.notes[0]
    assert any("only their index selected them" in note for note in report.notes) == (not fused)
    found = read_masks(report.path)
    reached = (
        next(iter(found.values())) if fused else np.stack([found[f"{stem}.{e}.down_proj.weight"] for e in range(4)])
    )
    assert reached[2].any() == (not fused)


def test_a_share_that_selects_nothing_is_noted(tmp_path: Path) -> None:
    report = mask(
        write(tmp_path / "f.safetensors", fisher_arrays(1)),
        tmp_path / "m.safetensors",
        MaskOptions(train="top", keep=0.1),
    )
    assert report.notes == (
        f"too small for a share of 0.1, so that nothing of them is selected: model.layers.0.{NORM}.weight, {DOWN}",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--train top .*--protect top"),
        ({"train": "top", "protect": "top"}, "opposites"),
        ({"train": "bottom"}, "--train.*top.*'bottom'"),
        ({"train": "top", "keep": 0.0}, "above 0 and below 1.*0 selects nothing"),
        ({"train": "top", "keep": 1.0}, "above 0 and below 1.*1 selects everything"),
        ({"train": "top", "keep": 1.5}, "1.5 is no share"),
        ({"train": "top", "keep": float("nan")}, "nan is no share"),
        ({"train": "top", "score": "magnitude"}, "--weights"),
        ({"train": "top", "weights": "m"}, "--weights.*--score fisher"),
        ({"train": "top", "aggregate": "none", "combine": "max"}, "--aggregate none"),
        ({"train": "top", "contrast": "ratio"}, "--against"),
        ({"train": "top", "against": Path("x"), "score": "random"}, "--score random"),
        ({"train": "top", "basis": "weight"}, "--basis weight.*subspaces"),
        ({"train": "top", "side": "left"}, "--side left.*subspaces"),
        ({"preset": "wanda"}, "--preset.*fggm, fish, ssu"),
        ({"svd_rank": 4, "svd_energy": 0.5}, "give one of them"),
        ({"svd_rank": 0}, "--svd-rank.*at least 1"),
        ({"svd_energy": 0.0}, "--svd-energy.*above 0"),
        ({"svd_energy": 1.1}, "--svd-energy.*above 0"),
        ({"svd_rank": 4, "train": "top"}, "protected, never trained"),
        ({"svd_rank": 4, "keep": 0.3}, "--keep 0.3.*binary masks"),
        ({"svd_rank": 4, "basis": "weight"}, "--basis weight.*the weights"),
        ({"svd_rank": 4, "basis": "delta", "weights": "m"}, "--basis delta.*--delta"),
        ({"svd_rank": 4, "device": "moon"}, "--device.*auto"),
    ],
)
def test_options_that_make_no_sense_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MaskOptions(**options)


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    arrays = fisher_arrays()
    other = write(tmp_path / "other.safetensors", {name: a[..., :5].copy() for name, a in arrays.items()})
    lacking = write(tmp_path / "lacking.safetensors", {Q: arrays[Q]})
    options = {"train": "top", "score": "magnitude"}
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight.*\[11, 7\] in .*fisher.safetensors.*\[11, 5\] in .*other"
    ):
        made(tmp_path, arrays, weights=str(other), **options)
    with pytest.raises(CheckpointError, match=r"lacking.safetensors.*9 tensors"):
        made(tmp_path, arrays, weights=str(lacking), **options)
    with pytest.raises(CheckpointError, match="has nothing for"):
        made(tmp_path, arrays, train="top", against=lacking)


def test_what_is_no_fisher_is_refused(tmp_path: Path) -> None:
    made(tmp_path, fisher_arrays(), train="top")
    with pytest.raises(CheckpointError, match=r"mask.safetensors: not a Fisher.*BOOL"):
        mask(tmp_path / "mask.safetensors", tmp_path / "n.safetensors", MaskOptions(train="top"))
    with pytest.raises(OptionError, match=r"the Fisher.*\.json"):
        mask(tmp_path / "mask.json", tmp_path / "n.safetensors", MaskOptions(train="top"))


def test_outputs_replace_nothing_by_accident(tmp_path: Path) -> None:
    arrays = fisher_arrays()
    fisher = write(tmp_path / "fisher.safetensors", arrays, architecture="LlamaForCausalLM")
    options, forced = MaskOptions(train="top"), MaskOptions(train="top", force=True)
    before = fisher.read_bytes(), fisher.with_suffix(".json").read_bytes()
    for out, message in (
        ("mask.pt", "mask.*\\.safetensors"),
        ("mask", "mask.*\\.safetensors"),
        ("fisher.safetensors", "input of this command"),
        ("nowhere/m.safetensors", "there is no folder"),
    ):
        with pytest.raises(OutputError, match=message):
            mask(fisher, tmp_path / out, forced)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"config.json: exists already"):
        mask(fisher, tmp_path / "config.safetensors", forced)
    mask(fisher, tmp_path / "mask.safetensors", options)
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        mask(fisher, tmp_path / "mask.safetensors", options)
    mask(fisher, tmp_path / "mask.safetensors", forced)
    assert (fisher.read_bytes(), fisher.with_suffix(".json").read_bytes()) == before


def test_a_failed_run_leaves_the_old_mask(tmp_path: Path) -> None:
    arrays = fisher_arrays()
    made(tmp_path, arrays, train="top")
    before = (tmp_path / "mask.safetensors").read_bytes()
    arrays[Q][0, 0] = np.nan
    with pytest.raises(CheckpointError, match="holds NaN"):
        made(tmp_path, arrays, train="top", force=True)
    assert (tmp_path / "mask.safetensors").read_bytes() == before
    assert inspect(tmp_path / "mask.safetensors").kind == "mask"


def test_a_binary_mask_needs_no_torch(tmp_path: Path) -> None:
    fisher = write(tmp_path / "fisher.safetensors", fisher_arrays())
    code = (
        "import sys, fisherkit; "
        f"fisherkit.mask({str(fisher)!r}, {str(tmp_path / 'm.safetensors')!r}, fisherkit.MaskOptions(preset='fggm')); "
        f"assert fisherkit.inspect({str(tmp_path / 'm.safetensors')!r}).kind == 'mask'; "
        "print([name for name in ('torch', 'transformers', 'safetensors', 'rich', 'typer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
