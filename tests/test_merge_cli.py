"""``fisherkit merge`` at the command line against a few lines of numpy: masks, subspaces, scales, interpolation."""

import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from pairs import Pair, cli, one_line, worked
from transformers import AutoModelForCausalLM

from fisherkit.artefacts.mask_file import MaskEntry, entry, header, pack
from fisherkit.errors import ResumeError
from fisherkit.methods.merge.merge import merge
from fisherkit.options import MergeOptions
from fisherkit.pairs import rewrite

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Mask = tuple[Flags, tuple[int, ...], int | None, bool]  # flags, the weight's shape, the axis they are over, packed
LAYERS = 3
Q = "model.layers.{}.self_attn.q_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same in float32, where products can be compared closely."""
    return pairs.make(tmp_path_factory.mktemp("wide"), dtype=torch.float32)


def doubles(checkpoint: Path) -> dict[str, Doubles]:
    """All tensors, exactly."""
    return {name: tensor.double().numpy() for name, tensor in pairs.tensors(checkpoint).items()}


def mask_file(path: Path, masks: Mapping[str, Mask]) -> Path:
    """A mask of flags for weights of some shape: one flag per entry, or over an axis; packed or not."""
    entries = {name: entry(mask[0], mask[1], over=mask[2], packed=mask[3]) for name, mask in masks.items()}
    stored = {name: pack(flags) if packed else flags for name, (flags, _, _, packed) in masks.items()}
    safetensors.numpy.save_file(stored, path, metadata={"format": "pt"})
    path.with_suffix(".json").write_text(json.dumps(header("mask", path.name, entries, direction="train")))
    return path


def drawn_masks(base: Path, seed: int = 3) -> dict[str, Mask]:
    """Masks of every kind: rows and columns of a weight, its entries, its entries in bits."""
    random = np.random.default_rng(seed)
    masks: dict[str, Mask] = {}
    for number, (name, tensor) in enumerate(pairs.tensors(base).items()):
        shape, over = tuple(tensor.shape), (1, 0, None, None)[number % 4]
        if tensor.ndim < 2 or "lm_head" in name:
            continue
        flags = random.random(shape if over is None else (shape[1 - over],)) < 0.4
        masks[name] = (flags, shape, over, over is None and number % 2 == 1)
    assert len({(over, packed) for _, _, over, packed in masks.values()}) == 4
    return masks


def spread(flags: Flags, shape: tuple[int, ...], over: int | None) -> Flags:
    """A flag per entry."""
    return np.broadcast_to(flags if over is None else np.expand_dims(flags, over), shape)


def subspace_file(path: Path, base: Path, names: list[str], rank: int = 3) -> dict[str, tuple[Doubles, Doubles]]:
    """Directions of outputs and inputs by weight, as float64; written as the format has them."""
    random = np.random.default_rng(4)
    found, stored, entries = {}, {}, {}
    for name in names:
        shape = tuple(pairs.tensors(base)[name].shape)
        u, v = (np.linalg.qr(random.standard_normal((size, rank)))[0].astype(np.float32) for size in shape)
        stored |= {f"{name}.U": u, f"{name}.S": np.ones(rank, np.float32), f"{name}.V": v}
        found[name], entries[name] = (u.astype(np.float64), v.astype(np.float64)), MaskEntry(shape)
    safetensors.numpy.save_file(stored, path, metadata={"format": "pt"})
    path.with_suffix(".json").write_text(json.dumps(header("subspace", path.name, entries)))
    return found


def removed(d: Doubles, u: Doubles, v: Doubles, side: str) -> Doubles:
    """``(I - U U^T) d (I - V V^T)``, or one factor of it."""
    left = np.eye(len(u)) - (u @ u.T if side in ("both", "left") else 0)
    right = np.eye(len(v)) - (v @ v.T if side in ("both", "right") else 0)
    return left @ d @ right


def importance_file(path: Path, means: list[float], form: str = "extract") -> Path:
    """Layer importance in one of the forms that are read."""
    rows = [{"layer": layer, "name": f"model.layers.{layer}", "mean": mean} for layer, mean in enumerate(means)]
    content: Any = {"model": "m", "total": 1.0, "layers": rows}
    if form != "extract":
        content = means if form == "list" else {str(layer): mean for layer, mean in enumerate(means)}
    path.write_text(json.dumps(content))
    return path


def scale_of(name: str, means: list[float], power: float, floor: float) -> float:
    """The factor of a tensor's delta."""
    if ".layers." not in name:
        return 1.0
    layer = int(name.split(".layers.")[1].split(".", maxsplit=1)[0])
    return float(min(1.0, max(floor, (statistics.median(means) / means[layer]) ** power))) if means[layer] else 1.0


# One at a time


@pytest.mark.parametrize("rest", ["tuned", "base"])
def test_a_mask_takes_the_fine_tunes_entries_where_it_allows_change(rest: str, pair: Pair, tmp_path: Path) -> None:
    masks = drawn_masks(pair[0])
    path = mask_file(tmp_path / "mask.safetensors", masks)
    done = cli("merge", *pair, tmp_path / "out", "--mask", path, "--rest", rest, "--json")
    ours, theirs, got = (pairs.tensors(one) for one in (*pair, tmp_path / "out"))
    for name, tensor in got.items():
        if name in masks:
            flags = torch.from_numpy(spread(*masks[name][:3]).copy())
            wanted = torch.where(flags, theirs[name], ours[name])
        else:
            wanted = (theirs if rest == "tuned" else ours)[name]
        assert pairs.same_bits(tensor, wanted), name
    report = json.loads(worked(done))
    changed = sum(int((got[name] != ours[name]).sum()) for name in report["tensors"])
    assert report["totals"]["kept"] == changed
    assert set(report["tensors"]) == (set(masks) if rest == "base" else set(got))


def test_masks_that_allow_everything_or_nothing(pair: Pair, tmp_path: Path) -> None:
    for value, side in ((True, pair[1]), (False, pair[0])):
        held = pairs.tensors(pair[0])
        masks = {name: (np.full(one.shape, value), tuple(one.shape), None, True) for name, one in held.items()}
        worked(
            cli("merge", *pair, tmp_path / str(value), "--mask", mask_file(tmp_path / f"{value}.safetensors", masks))
        )
        assert pairs.same_checkpoint(tmp_path / str(value), side)


@pytest.mark.parametrize("alpha", ["0", "0.3", "1", "-0.5", "2"])
def test_alpha_alone_interpolates_and_rounds_once(alpha: str, pair: Pair, tmp_path: Path) -> None:
    worked(cli("merge", *pair, tmp_path / "out", "--alpha", alpha))
    ours, theirs, got = (pairs.tensors(one) for one in (*pair, tmp_path / "out"))
    for name, tensor in got.items():
        d = theirs[name].float() - ours[name].float()
        wanted = ours[name].float() + np.float32(float(alpha)) * d
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name
    assert pairs.same_checkpoint(tmp_path / "out", pair[0]) == (alpha == "0")
    assert pairs.same_checkpoint(tmp_path / "out", pair[1]) == (alpha == "1")


@pytest.mark.parametrize("form", ["extract", "list", "mapping"])
@pytest.mark.parametrize(("power", "floor"), [(0.5, 0.1), (1, 0), (3, 0.25), (0, 0.1)])
def test_important_layers_change_less(form: str, power: float, floor: float, wide: Pair, tmp_path: Path) -> None:
    means = [4e-9, 0.0, 1e-9]
    path = importance_file(tmp_path / "layer_importance.json", means, form)
    words = ("--layer-scale", path, "--power", power, "--floor", floor, "--json")
    report = json.loads(worked(cli("merge", *wide, tmp_path / "out", *words)))
    ours, theirs, got = (doubles(one) for one in (*wide, tmp_path / "out"))
    for name in got:
        scale = scale_of(name, means, power, floor)
        assert report["tensors"][name]["scale"] == pytest.approx(scale, rel=1e-6)
        np.testing.assert_allclose(got[name], ours[name] + scale * (theirs[name] - ours[name]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("side", ["both", "left", "right"])
def test_nothing_is_left_in_the_directions_of_a_subspace(side: str, wide: Pair, tmp_path: Path) -> None:
    names = [Q.format(0), DOWN.format(2), "lm_head.weight"]
    found = subspace_file(tmp_path / "sub.safetensors", wide[0], names)
    worked(cli("merge", *wide, tmp_path / "out", "--subspace", tmp_path / "sub.safetensors", "--side", side))
    ours, theirs, got = (doubles(one) for one in (*wide, tmp_path / "out"))
    for name in got:
        d, left = theirs[name] - ours[name], got[name] - ours[name]
        wanted = removed(d, *found[name], side) if name in found else d
        np.testing.assert_allclose(left, wanted, rtol=0, atol=1e-7)
    for name, (u, v) in found.items():
        left = got[name] - ours[name]
        if side != "right":
            assert np.abs(u.T @ left).max() < 1e-6
        if side != "left":
            assert np.abs(left @ v).max() < 1e-6


def test_all_of_them_act_in_their_order(wide: Pair, tmp_path: Path) -> None:
    masks, means = drawn_masks(wide[0]), [1e-9, 9e-9, 2e-9]
    found = subspace_file(tmp_path / "sub.safetensors", wide[0], [Q.format(0), Q.format(1), DOWN.format(1)])
    words = (
        *("--mask", mask_file(tmp_path / "mask.safetensors", masks)),
        *("--subspace", tmp_path / "sub.safetensors", "--alpha", "0.7"),
        *("--layer-scale", importance_file(tmp_path / "layer_importance.json", means)),
    )
    worked(cli("merge", *wide, tmp_path / "out", *words))
    ours, theirs, got = (doubles(one) for one in (*wide, tmp_path / "out"))
    for name in got:
        d = theirs[name] - ours[name]
        if name in masks:
            d = d * spread(*masks[name][:3])
        if name in found:
            d = removed(d, *found[name], "both")
        wanted = ours[name] + 0.7 * scale_of(name, means, 0.5, 0.1) * d
        np.testing.assert_allclose(got[name], wanted, rtol=0, atol=1e-7, err_msg=name)


def test_an_adapter_is_added_as_its_definition_says(wide: Pair, tmp_path: Path) -> None:
    ours = pairs.tensors(wide[0])
    lora = pairs.adapter(tmp_path / "lora", {name: ours[name] for name in (Q.format(0), DOWN.format(1))})
    factors = doubles(lora)
    worked(cli("merge", wide[0], lora, tmp_path / "out", "--alpha", "0.5"))
    got = doubles(tmp_path / "out")
    for name, base in doubles(wide[0]).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        delta = np.zeros(base.shape)
        if f"{stem}.lora_A.weight" in factors:
            delta = 2 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(got[name], base + 0.5 * delta, rtol=0, atol=1e-6)


def test_a_mask_also_holds_for_a_sparse_delta(pair: Pair, tmp_path: Path) -> None:
    masks = drawn_masks(pair[0])
    delta, path = tmp_path / "delta.safetensors", mask_file(tmp_path / "mask.safetensors", masks)
    worked(cli("fapm", *pair, tmp_path / "pruned", "--sparse", delta, "--sparsity", "0.5"))
    for side, out in ((delta, "a"), (tmp_path / "pruned", "b")):
        worked(cli("merge", pair[0], side, tmp_path / out, "--mask", path))
    assert pairs.same_checkpoint(tmp_path / "a", tmp_path / "b")


# What comes out


def test_reports_agree_and_the_output_loads(pair: Pair, tmp_path: Path) -> None:
    done = cli(
        "merge", *pair, tmp_path / "out", "--alpha", "0.25", "--json", "--report", tmp_path / "r.json", "--quiet"
    )
    report = json.loads(worked(done))
    assert done.stderr == ""
    assert report == json.loads((tmp_path / "r.json").read_text())
    made = json.loads((tmp_path / "out" / "fisherkit.json").read_text())
    assert made["totals"] == report["totals"]
    assert sorted([*made["files"], "fisherkit.json"]) == sorted(pairs.files(tmp_path / "out"))
    assert report["totals"]["energy_kept"] == pytest.approx(0.0625)
    assert f"fisherkit merge {pair[0].name} {pair[1].name}" in (tmp_path / "out" / "README.md").read_text()
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"]
    assert next(model.parameters()).dtype == torch.bfloat16
    done = cli("merge", *pair, tmp_path / "plain.safetensors")
    assert worked(done) == f"{tmp_path / 'plain.safetensors'}\n"
    assert pairs.same_checkpoint(tmp_path / "plain.safetensors", pair[1])


# Other layouts


def text_only(tuned: Path, folder: Path) -> Path:
    """The language model of a multimodal checkpoint alone, under the names that it has by itself."""
    held = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in pairs.tensors(tuned).items()
        if "language_model." in name or name.startswith("lm_head")
    }
    folder.mkdir()
    safetensors.torch.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text())
    text = config["text_config"] | {"architectures": ["Gemma4ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def test_a_text_models_fine_tune_and_mask_go_onto_the_multimodal_base(tmp_path: Path) -> None:
    base, tuned = pairs.make(tmp_path, "gemma4-31b")
    alone = text_only(tuned, tmp_path / "alone")
    held = pairs.tensors(alone)
    some = {name: held[name] for name in held if "layers.1." in name and held[name].ndim == 2}
    random = np.random.default_rng(0)
    masks = {name: (random.random(len(one)) < 0.5, tuple(one.shape), 1, False) for name, one in some.items()}
    path = mask_file(tmp_path / "mask.safetensors", masks)
    done = cli("merge", base, alone, tmp_path / "out", "--mask", path, "--rest", "base")
    worked(done)
    assert "FT has no" in done.stderr
    ours, theirs, got = (pairs.tensors(one) for one in (base, tuned, tmp_path / "out"))
    for name, tensor in got.items():
        short = name.replace("model.language_model.", "model.")
        if short in masks:
            flags = torch.from_numpy(spread(*masks[short][:3]).copy())
            assert pairs.same_bits(tensor, torch.where(flags, theirs[name], ours[name])), name
        else:
            assert pairs.same_bits(tensor, ours[name]), name
    for command in ("fapm", "merge"):
        worked(cli(command, base, alone, tmp_path / command))
        worked(cli(command, base, tuned, tmp_path / f"{command}-whole", "--skip", "vision", "--rest", "base"))
        got, whole = pairs.tensors(tmp_path / command), pairs.tensors(tmp_path / f"{command}-whole")
        assert got.keys() == ours.keys()
        for name in got:
            if "language_model." in name:
                assert pairs.same_bits(got[name], whole[name]), name
            elif "vision" in name:
                assert pairs.same_bits(got[name], ours[name]), name


def test_fused_experts_go_onto_experts_one_by_one(tmp_path: Path) -> None:
    base, tuned = pairs.make(tmp_path, "qwen3-moe")
    held = pairs.tensors(tuned)
    fused = {name: tensor for name, tensor in held.items() if ".experts." not in name}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {kind: [held[f"{stem}.{n}.{kind}_proj.weight"] for n in range(4)] for kind in ("gate", "up", "down")}
        both = [torch.cat(rows) for rows in zip(parts["gate"], parts["up"], strict=True)]
        fused |= {f"{stem}.gate_up_proj": torch.stack(both), f"{stem}.down_proj": torch.stack(parts["down"])}
    (tmp_path / "fused").mkdir()
    shutil.copy(tuned / "config.json", tmp_path / "fused")
    safetensors.torch.save_file(fused, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    for words in (["merge", "--alpha", "0.5"], ["fapm"], ["fapm", "--scope", "global"]):
        outs = [tmp_path / f"{words[0]}{len(words)}{side.name}" for side in (tuned, tmp_path / "fused")]
        for side, out in zip((tuned, tmp_path / "fused"), outs, strict=True):
            worked(cli(words[0], base, side, out, *words[1:]))
        assert pairs.same_checkpoint(*outs)


# Bad input


def test_masks_of_other_models_and_other_kinds_are_refused(pair: Pair, tmp_path: Path) -> None:
    out, name, shape = tmp_path / "out", Q.format(0), (32, 32)
    rows = np.ones(32, bool)
    other = mask_file(tmp_path / "other.safetensors", {Q.format(7): (rows, shape, 1, False)})
    line = one_line(cli("merge", *pair, out, "--mask", other))
    assert "1 of its 1 weights are not in" in line
    assert Q.format(7) in line
    misfit = mask_file(tmp_path / "misfit.safetensors", {name: (np.ones(48, bool), (48, 32), 1, False)})
    line = one_line(cli("merge", *pair, out, "--mask", misfit))
    assert f"{name} is [32, 32] in this model and [48, 32] in this mask; it was made for another model" in line
    subspace_file(tmp_path / "sub.safetensors", pair[0], [name])
    assert "is a subspace; give it as --subspace" in one_line(
        cli("merge", *pair, out, "--mask", tmp_path / "sub.safetensors")
    )
    good = mask_file(tmp_path / "good.safetensors", {name: (rows, shape, 1, False)})
    assert "is a mask; give it as --mask" in one_line(cli("merge", *pair, out, "--subspace", good))
    good.write_bytes(good.read_bytes()[:-5])
    assert "good.safetensors: truncated" in one_line(cli("merge", *pair, out, "--mask", good))
    nowhere = one_line(cli("merge", *pair, out, "--mask", tmp_path / "nowhere.safetensors"))
    assert "nowhere.safetensors: no such file or directory" in nowhere
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[1, 2]", "is about 2 layers, and BASE has 3"),
        ("[1, 2, 3, 4]", "is about 4 layers, and BASE has 3"),
        ('{"0": 1, "1": 2, "7": 3}', "and BASE has 3"),
        ("[1, -2, 3]", "layer 1 has the importance -2"),
        ("[1, NaN, 3]", "layer 1 has the importance nan"),
        ('{"layers": 3}', "not a layer importance"),
        ("[]", "not a layer importance"),
        ("{", "not valid JSON"),
    ],
)
def test_layer_importance_that_does_not_fit_is_refused(content: str, what: str, pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "layer_importance.json"
    path.write_text(content)
    line = one_line(cli("merge", *pair, tmp_path / "out", "--layer-scale", path))
    assert what in line
    assert "layer_importance.json" in line
    assert [one.name for one in tmp_path.iterdir()] == ["layer_importance.json"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--side", "up"], "--side must be one of both, left, right"),
        (["--floor", "1.5"], "--floor must lie between 0 and 1"),
        (["--power", "-1"], "--power must not be negative"),
        (["--power", "inf"], "--power must be a finite number"),
        (["--alpha", "nan"], "--alpha must be a finite number"),
        (["--only", "zzz"], "--only 'zzz': no tensor of both sides has such a name"),
        (["--skip", "."], "--only and --skip leave no tensor"),
        (["--nan", "zero"], "--nan must be one of refuse, keep-base"),
        (["--report", "r.txt"], "a report ends in .json"),
        (["--max-shard-size", "big"], "--max-shard-size takes bytes"),
    ],
)
def test_options_out_of_range_are_usage_errors(arguments: list[str], what: str, pair: Pair, tmp_path: Path) -> None:
    assert what in one_line(cli("merge", *pair, tmp_path / "out", *arguments), 2)
    assert cli("merge", *pair).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_mask_is_not_written_over(pair: Pair, tmp_path: Path) -> None:
    path = mask_file(tmp_path / "mask.safetensors", {Q.format(0): (np.ones(32, bool), (32, 32), 1, False)})
    before = pairs.files(tmp_path)
    for words in ([path], [tmp_path / "out", "--report", path.with_suffix(".json")]):
        line = one_line(cli("merge", *pair, *words, "--mask", path, "--force"))
        assert "belongs to an input; choose another name" in line
    assert pairs.files(tmp_path) == before


def test_a_run_is_not_gone_on_with_under_another_mask(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KilledError

    monkeypatch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    flags = np.ones(32, bool)
    path = mask_file(tmp_path / "mask.safetensors", {Q.format(0): (flags, (32, 32), 1, False)})
    with pytest.raises(KilledError):
        merge(*pair, tmp_path / "out", MergeOptions(mask=path), track=kill)
    path.unlink()
    mask_file(path, {Q.format(0): (~flags, (32, 32), 1, False)})
    with pytest.raises(ResumeError, match="other options"):
        merge(*pair, tmp_path / "out", MergeOptions(mask=path, resume=True))


@pytest.mark.parametrize(
    ("options", "owner"),
    [
        (("--old-weight", "3"), "--old-weight is for --regmean and --fisher"),
        (("--damping", "5"), "--damping is for --regmean and --fisher"),
        (("--power", "3"), "--power is for --layer-scale"),
        (("--floor", "0.5"), "--floor is for --layer-scale"),
        (("--side", "left"), "--side is for --subspace"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    options: tuple[str, ...], owner: str, pair: Pair, tmp_path: Path
) -> None:
    assert owner in one_line(cli("merge", *pair, tmp_path / "out", *options), code=2)
    assert not list(tmp_path.iterdir())
