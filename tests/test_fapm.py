"""fapm and merge on whole checkpoints against a plain script that holds everything in memory."""

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fisherkit
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.names.location import block_prefix, locate
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.options import FapmOptions, MergeOptions

Tensors = dict[str, torch.Tensor]
SHAPES = {
    "model.embed_tokens.weight": (600, 64),
    "model.layers.0.self_attn.q_proj.weight": (1000, 700),  # three blocks of the kernels
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.self_attn.q_proj.weight": (128, 300),
    "model.layers.1.mlp.scale": (),
    "model.layers.1.mlp.experts.down_proj": (4, 32, 16),
    "model.norm.weight": (5,),
    "lm_head.weight": (600, 64),
}


def make(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint in two files, as users have it."""
    folder.mkdir()
    names = list(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return folder


def tensors_of(dtype: torch.dtype, seed: int = 0) -> tuple[Tensors, Tensors]:
    """Both sides: some entries unchanged, some zero, one tensor without any change."""
    random = torch.Generator().manual_seed(seed)
    base, tuned = {}, {}
    for name, shape in SHAPES.items():
        w = torch.randn(shape, generator=random) * 0.02
        d = torch.randn(shape, generator=random) * 1e-3
        d[torch.rand(shape, generator=random) < 0.1] = 0
        w[torch.rand(shape, generator=random) < 0.02] = 0
        base[name], tuned[name] = w.to(dtype), (w + d).to(dtype)
    tuned["model.norm.weight"] = base["model.norm.weight"].clone()
    return base, tuned


def scores_of(w: torch.Tensor, f: torch.Tensor, metric: str) -> np.ndarray:
    """Scores in float32 as the definition has them; -inf where an entry has no claim."""
    w32, f32 = w.float().flatten().numpy(), f.float().flatten().numpy()
    d, a = np.abs(f32 - w32), np.abs(w32)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.float32(a.astype(np.float64).mean()) if a.size else np.float32(0)
        scores = {"fapm": d * (np.float32(1) - mean / a), "relative": -(d / a), "magnitude": d}[metric]
    scores[(d == 0) | ((a == 0) & (metric != "magnitude"))] = -np.inf
    return scores


def expected(base: Tensors, tuned: Tensors, order: list[str], share: Fraction, scope: str, metric: str) -> Tensors:
    """All scores of a group in one array, one stable sort."""
    blocks = block_prefix(order)
    groups: dict[str, list[str]] = {}
    for name in order:
        key = {"tensor": name, "layer": locate(name, blocks).layer_name, "global": ""}[scope]
        groups.setdefault(key, []).append(name)
    out: Tensors = {}
    for names in groups.values():
        scores = np.concatenate([scores_of(base[name], tuned[name], metric) for name in names])
        flags = np.zeros(scores.size, bool)
        flags[np.argsort(-scores.astype(np.float64), kind="stable")[: math.floor(share * scores.size)]] = True
        flags &= scores > -np.inf
        at = 0
        for name in names:
            size = base[name].numel()
            keep = torch.from_numpy(flags[at : at + size]).reshape(base[name].shape)
            out[name] = torch.where(keep, tuned[name].to(base[name].dtype), base[name])
            at += size
    return out


def read(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    with Reader(open_index(folder)) as reader:
        return dict(reader)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal types, shapes and bytes: -0.0 is not 0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def sides(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Tensors, Tensors]:
    folder = tmp_path_factory.mktemp("sides")
    base, tuned = tensors_of(request.param)
    return make(folder / "base", base), make(folder / "tuned", tuned), base, tuned


TensorPair = tuple[Path, Path, Tensors, Tensors]


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_output_is_that_of_one_stable_sort(sides: TensorPair, tmp_path: Path, scope: str, sparsity: float) -> None:
    base, tuned, w, f = sides
    options = FapmOptions(sparsity=sparsity, scope=scope)  # type: ignore[arg-type]
    report = fisherkit.fapm(base, tuned, tmp_path / "out", options)
    order = list(open_index(base).tensors)
    wanted = expected(w, f, order, 1 - Fraction(repr(sparsity)), scope, "fapm")
    got = read(tmp_path / "out")
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert same_bits(got[name], wanted[name]), name
    if scope == "tensor":
        for name, row in report.tensors.items():
            scores = scores_of(w[name], f[name], "fapm")
            quota = math.floor((1 - Fraction(repr(sparsity))) * scores.size)
            assert row["kept"] == min(quota, np.isfinite(scores).sum())


@pytest.mark.parametrize("metric", ["relative", "magnitude"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_controls_select_by_their_own_scores(sides: TensorPair, tmp_path: Path, metric: str, scope: str) -> None:
    base, tuned, w, f = sides
    fisherkit.fapm(base, tuned, tmp_path / "out", FapmOptions(metric=metric, density=0.2, scope=scope))  # type: ignore[arg-type]
    wanted = expected(w, f, list(open_index(base).tensors), Fraction("0.2"), scope, metric)
    got = read(tmp_path / "out")
    assert all(same_bits(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_random_keeps_as_many_and_depends_on_the_seed_alone(sides: TensorPair, tmp_path: Path, scope: str) -> None:
    base, tuned, w, f = sides
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = FapmOptions(metric="random", density=0.25, scope=scope, seed=seed)  # type: ignore[arg-type]
        report = fisherkit.fapm(base, tuned, tmp_path / name, options)
    first, again, other = (read(tmp_path / name) for name in "abc")
    assert all(same_bits(first[name], again[name]) for name in w)
    big = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[big], other[big])
    kept = (first[big] != w[big]).sum() / w[big].numel()
    assert kept == pytest.approx(0.25, abs=0.005 if scope == "tensor" else 0.02)
    if scope == "tensor":
        assert report.tensors[big]["kept"] == 175_000
    assert all(((first[n] == w[n]) | (first[n] == f[n])).all() for n in w)


def test_every_entry_is_of_one_side_in_the_bases_type(tmp_path: Path) -> None:
    w, _ = tensors_of(torch.bfloat16)
    _, f = tensors_of(torch.float32)
    base, tuned = make(tmp_path / "b", w), make(tmp_path / "f", f)
    report = fisherkit.fapm(base, tuned, tmp_path / "out", FapmOptions(sparsity=0.5))
    rounded = {name: tensor.to(w[name].dtype) for name, tensor in f.items()}  # what the output can hold
    wanted = expected(w, rounded, list(open_index(base).tensors), Fraction("0.5"), "tensor", "fapm")
    for name, row in report.tensors.items():
        assert row["zero_deltas"] == int((rounded[name] == w[name]).sum())
        vanished = int(((f[name] != w[name].float()) & (rounded[name] == w[name])).sum())
        assert row.get("rounded_away", 0) == vanished
    assert all(same_bits(tensor, wanted[name]) for name, tensor in read(tmp_path / "out").items())


@pytest.mark.parametrize("how", ["fapm", "merge", "dare"])
def test_changes_too_small_for_the_bases_type_are_counted_and_told(tmp_path: Path, how: str) -> None:
    w = {name: tensor.bfloat16() for name, tensor in tensors_of(torch.float32)[0].items()}
    f = {name: tensor.float() * (1 + 1e-4) for name, tensor in w.items()}  # less than half a step of bfloat16
    name = "model.layers.0.self_attn.q_proj.weight"
    f[name][:10] *= 1.5
    base, tuned, out = make(tmp_path / "b", w), make(tmp_path / "f", f), tmp_path / "out"
    said: list[str] = []
    report: Any
    if how == "merge":
        report = fisherkit.merge(base, tuned, out, MergeOptions(alpha=0.5), say=said.append)
    else:
        metric: Any = "magnitude" if how == "fapm" else "dare"
        report = fisherkit.fapm(base, tuned, out, FapmOptions(metric=metric, density=0.5), say=said.append)
    got = read(out)
    assert sum(int((got[n] != w[n]).sum()) for n in w) == report.totals["kept"] > 0
    assert any("too small for BASE's type (BF16)" in line for line in said)


def test_a_misleading_sample_costs_a_pass_and_nothing_else(
    sides: TensorPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fisherkit.kernels.top_k import ThresholdRange
    from fisherkit.pairs import prune

    base, tuned, w, f = sides
    wanted = expected(w, f, list(open_index(base).tensors), Fraction("0.1"), "tensor", "fapm")
    for low, high in ((1.0, 2.0), (1e-9, 2e-9)):
        monkeypatch.setattr(
            prune, "threshold_range", lambda *_, low=low, high=high: ThresholdRange(np.float32(low), np.float32(high))
        )
        out = tmp_path / str(low)
        fisherkit.fapm(base, tuned, out)
        assert all(same_bits(tensor, wanted[name]) for name, tensor in read(out).items())


def test_energy_and_counts_are_those_of_float64(sides: TensorPair, tmp_path: Path) -> None:
    base, tuned, w, f = sides
    report = fisherkit.fapm(base, tuned, tmp_path / "out")
    out = read(tmp_path / "out")
    for name, row in report.tensors.items():
        d = f[name].double() - w[name].double()
        left = out[name].double() - w[name].double()
        assert row["zero_deltas"] == int((d == 0).sum())
        assert row["zero_weights"] == int((w[name] == 0).sum())
        assert row["energy"] == pytest.approx(float(d.square().sum()), rel=1e-5)
        if row["energy"]:
            assert row["energy_kept"] == pytest.approx(float(left.square().sum() / d.square().sum()), rel=1e-5)
    assert report.totals["kept"] == sum(row["kept"] for row in report.tensors.values())


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_a_sweep_reports_what_single_runs_do(sides: TensorPair, tmp_path: Path, scope: str) -> None:
    base, tuned, *_ = sides
    options = FapmOptions(scope=scope)  # type: ignore[arg-type]
    swept = fisherkit.sweep_fapm(base, tuned, [0.5, 0.9, 0.99], options)
    for sparsity, one in zip([0.5, 0.9, 0.99], swept, strict=True):
        alone = fisherkit.fapm(base, tuned, tmp_path / str(sparsity), FapmOptions(scope=scope, sparsity=sparsity))  # type: ignore[arg-type]
        assert one.tensors == alone.tensors
        assert one.totals == alone.totals


def test_wise_ft_interpolates_and_rounds_once(sides: TensorPair, tmp_path: Path) -> None:
    base, tuned, w, f = sides
    fisherkit.fapm(base, tuned, tmp_path / "a", FapmOptions(metric="wise-ft", density=0.3))
    fisherkit.merge(base, tuned, tmp_path / "b", MergeOptions(alpha=0.3))
    for name, tensor in read(tmp_path / "a").items():
        d = f[name].float() - w[name].float()
        wanted = torch.where(d == 0, w[name], (w[name].float() + d * np.float32(0.3)).to(w[name].dtype))
        assert same_bits(tensor, wanted)
        assert same_bits(read(tmp_path / "b")[name], wanted)


@pytest.mark.parametrize("metric", ["dare", "della"])
def test_thinned_entries_are_rescaled_or_the_bases(sides: TensorPair, tmp_path: Path, metric: str) -> None:
    base, tuned, w, f = sides
    report = fisherkit.fapm(base, tuned, tmp_path / "out", FapmOptions(metric=metric, density=0.5))  # type: ignore[arg-type]
    name = "model.layers.0.self_attn.q_proj.weight"
    got, d = read(tmp_path / "out")[name], f[name].float() - w[name].float()
    changed = got != w[name]
    assert report.totals["density"] == pytest.approx(0.45, abs=0.025)  # a tenth had not changed
    if metric == "dare":
        assert torch.equal(got[changed], (w[name].float() + 2 * d).to(got.dtype)[changed])
    mean = (got.float() - w[name].float()).mean() / d.mean()
    assert float(mean) == pytest.approx(1, abs=0.6)


def test_what_is_left_out_is_fts_or_bases(sides: TensorPair, tmp_path: Path) -> None:
    base, tuned, w, f = sides
    for rest, side in (("tuned", f), ("base", w)):
        out = tmp_path / rest
        report = fisherkit.fapm(base, tuned, out, FapmOptions(only=("matrices",), skip=("experts",), rest=rest))  # type: ignore[arg-type]
        got = read(out)
        assert set(report.tensors) == {
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.self_attn.q_proj.weight",
        }
        for name in w.keys() - report.tensors.keys():
            assert same_bits(got[name], side[name])
        assert set(report.rules["left_out"]["tensors"]) == w.keys() - report.tensors.keys()


def test_identical_sides_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    w, _ = tensors_of(torch.bfloat16)
    base, tuned = make(tmp_path / "b", w), make(tmp_path / "f", w)
    with pytest.raises(CheckpointError, match="identical to BASE"):
        fisherkit.fapm(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_finite_entries_are_named_or_the_bases(tmp_path: Path) -> None:
    w, f = tensors_of(torch.float32)
    name = "model.layers.1.self_attn.q_proj.weight"
    f[name][3, 7] = math.nan
    f[name][9, 9] = math.inf
    base, tuned = make(tmp_path / "b", w), make(tmp_path / "f", f)
    with pytest.raises(CheckpointError, match=rf"FT's.*'{name}'.* 2 NaN.*index 907"):
        fisherkit.fapm(base, tuned, tmp_path / "out")
    report = fisherkit.fapm(base, tuned, tmp_path / "out", FapmOptions(nan="keep-base", sparsity=0.0))
    got = read(tmp_path / "out")[name]
    assert got[3, 7] == w[name][3, 7]
    assert got[9, 9] == w[name][9, 9]
    assert report.tensors[name]["nonfinite"] == 2
    w[name][0, 1] = math.nan
    base = make(tmp_path / "b2", w)
    with pytest.raises(CheckpointError, match=rf"BASE's.*'{name}'.* 1 NaN"):
        fisherkit.fapm(base, tuned, tmp_path / "out2")


def test_unrelated_models_are_warned_of(tmp_path: Path) -> None:
    w, _ = tensors_of(torch.float32, 0)
    f, _ = tensors_of(torch.float32, 1)
    said: list[str] = []
    report = fisherkit.fapm(make(tmp_path / "b", w), make(tmp_path / "f", f), tmp_path / "out", say=said.append)
    assert "does not look like a fine-tune of BASE" in report.warnings[0]
    assert any(report.warnings[0] in line for line in said)


def test_a_sparse_delta_gives_the_same_model(sides: TensorPair, tmp_path: Path) -> None:
    base, tuned, w, _ = sides
    delta = tmp_path / "delta.safetensors"
    fisherkit.fapm(base, tuned, tmp_path / "out", sparse=delta)
    fisherkit.merge(base, delta, tmp_path / "again")
    first, again = read(tmp_path / "out"), read(tmp_path / "again")
    assert all(same_bits(first[name], again[name]) for name in w)
    size = sum(tensor.nbytes for tensor in w.values())
    item = next(iter(w.values())).itemsize
    assert delta.stat().st_size < size * (0.1 * (item + 2) / item) + 5000
    with pytest.raises(CheckpointError, match="made for another base"):
        fisherkit.merge(tuned, delta, tmp_path / "wrong")
    stored = load_file(delta)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert int(stored[f"{name}.count"].long().sum()) == stored[f"{name}.value"].numel() == 70_000


def test_density_alone_says_nothing_new(sides: TensorPair, tmp_path: Path) -> None:
    base, tuned, *_ = sides
    a = fisherkit.fapm(base, tuned, tmp_path / "a", FapmOptions(sparsity=0.7))
    b = fisherkit.fapm(base, tuned, tmp_path / "b", FapmOptions(density=0.3))
    assert a.tensors == b.tensors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.1}, "--sparsity.*0 and 1"),
        ({"density": -0.1}, "--density.*0 and 1"),
        ({"density": math.nan}, "--density.*0 and 1"),
        ({"sparsity": 0.5, "density": 0.5}, "give one of them"),
        ({"metric": "ties"}, "--metric.*one of"),
        ({"metric": "dare", "scope": "global"}, "has no quota"),
        ({"only": ("(",)}, "not a regular expression"),
        ({"shard_bytes": 0}, "--max-shard-size.*at least 1"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FapmOptions(**options)  # type: ignore[arg-type]
