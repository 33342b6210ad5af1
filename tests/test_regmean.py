"""``fisherkit merge --regmean`` at the command line: what is solved, what is left, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import covariance_files
import numpy as np
import pairs
import peft
import peft_adapters
import pytest
import torch
from kills import Killed, killed_after
from numpy.typing import NDArray
from pairs import Pair, cli, one_line, worked
from transformers import AutoModelForCausalLM

import fisherkit
from fisherkit.errors import OptionError
from fisherkit.methods.merge import regmean
from fisherkit.methods.merge.points import open_merge_points
from fisherkit.options import ExtractOptions, MergeOptions
from fisherkit.pairs import rewrite

Doubles = NDArray[np.float64]
MU = 1e-3
ATTENTION = tuple(f"model.layers.{{}}.self_attn.{one}_proj.weight" for one in "qkv")
DOWN = "model.layers.{}.mlp.down_proj.weight"
LAYERS = 3


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A llama in float32 and its fine-tune."""
    return pairs.make(tmp_path_factory.mktemp("wide"), dtype=torch.float32)


def inputs(seed: int, tokens: int = 100) -> dict[tuple[str, ...], Doubles]:
    """Inputs of queries, keys and values, and of the down projection, of every layer."""
    random = np.random.default_rng(seed)
    found: dict[tuple[str, ...], Doubles] = {}
    for layer in range(LAYERS):
        found[tuple(name.format(layer) for name in ATTENTION)] = random.standard_normal((tokens, 32))
        found[(DOWN.format(layer),)] = random.standard_normal((tokens, 48)) * 0.9 ** np.arange(48)
    return found


def files(folder: Path, pair: Pair) -> tuple[Path, Path]:
    """OLD, measured on BASE, and NEW, on FT."""
    return (
        covariance_files.write(folder / "old.safetensors", inputs(1), model=pair[0]),
        covariance_files.write(folder / "new.safetensors", inputs(2), model=pair[1]),
    )


def by_weight(given: covariance_files.Inputs) -> dict[str, Doubles]:
    return {name: covariance_files.covariance(rows) for names, rows in given.items() for name in names}


def doubles(checkpoint: Path) -> dict[str, Doubles]:
    return {name: tensor.double().numpy() for name, tensor in pairs.tensors(checkpoint).items()}


def solved(d: Doubles, new: Doubles, old: Doubles, lam: float) -> Doubles:
    g = new + MU * np.trace(new) / len(new) * np.eye(len(new))
    return d @ g @ np.linalg.inv(g + lam * old)


@pytest.mark.parametrize(("lam", "alpha"), [(1.0, 1.0), (0.1, 1.0), (5.0, 0.5)])
@pytest.mark.parametrize("rest", ["tuned", "base"])
def test_weights_with_covariances_are_solved_and_the_others_left(
    lam: float, alpha: float, rest: str, wide: Pair, tmp_path: Path
) -> None:
    old, new = files(tmp_path, wide)
    words = ["--regmean", old, new, "--old-weight", lam, "--alpha", alpha, "--rest", rest, "--json"]
    done = cli("merge", *wide, tmp_path / "out", *words)
    report = json.loads(worked(done))
    ours, theirs, got = (doubles(one) for one in (*wide, tmp_path / "out"))
    c_old, c_new = by_weight(inputs(1)), by_weight(inputs(2))
    for name, tensor in got.items():
        d = theirs[name] - ours[name]
        if name in c_old:
            d = solved(d, c_new[name], c_old[name], lam)
            row = report["tensors"][name]["regmean"]
            assert row["old_weight"] == lam
            assert row["old_energy"] * row["old_kept"] == pytest.approx(np.trace(d @ c_old[name] @ d.T), rel=1e-4)
            assert sorted(row["gains"], reverse=True) == row["gains"]
            assert 0 < row["damping_share"] < 0.1
        else:
            d = d * (rest == "tuned")
        np.testing.assert_allclose(tensor, ours[name] + alpha * d, rtol=0, atol=1e-7, err_msg=name)
    left = sorted(set(got) - set(c_old))
    assert sorted(report["rules"]["not_solved"]) == left
    whose = "FT's" if rest == "tuned" else "BASE's"
    assert f"note: {len(left)} tensors have no covariance and become {whose}" in done.stderr
    kept = report["totals"]["regmean"]
    assert f"{kept['new_kept']:.1%} is left on new inputs and {kept['old_kept']:.1%} on old ones" in done.stderr
    assert kept["tensors"] == len(c_old)
    assert kept["old_kept"] < kept["new_kept"] < 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_ends_of_its_range(pair: Pair, tmp_path: Path) -> None:
    old, new = files(tmp_path, pair)
    worked(cli("merge", *pair, tmp_path / "zero", "--regmean", old, new, "--old-weight", 0))
    assert pairs.same_checkpoint(tmp_path / "zero", pair[1])
    worked(cli("merge", *pair, tmp_path / "far", "--regmean", old, new, "--old-weight", "1e12", "--rest", "base"))
    assert pairs.same_checkpoint(tmp_path / "far", pair[0])  # 100 old tokens span all 48 channels


def test_weights_that_share_an_input_take_one_decomposition(
    wide: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = regmean.decompose

    def counted(*arguments: object) -> object:
        calls.append(1)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(regmean, "decompose", counted)
    worked(cli("merge", *wide, tmp_path / "out", "--regmean", *files(tmp_path, wide)))
    assert len(calls) == 2 * LAYERS


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe", "gemma4-31b"])
def test_what_extract_writes_is_taken(
    architecture: str, checkpoint: Callable[[str], Path], measured: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    """The file is named, or the Fisher that it lies beside; weights stored [in, out] are turned."""
    base, old = checkpoint(architecture), measured(architecture)
    tuned = pairs.fine_tune(base, tmp_path / "tuned")
    options = ExtractOptions(statistics="activations", batch_tokens=40)
    fisherkit.extract(tuned, prompts, tmp_path / "new.safetensors", options)
    beside = tmp_path / "new.activations.safetensors"
    for name, given in (("a", tmp_path / "new.safetensors"), ("b", beside)):
        fisherkit.merge(base, tuned, tmp_path / name, MergeOptions(regmean=(old, given)))
    assert pairs.same_checkpoint(tmp_path / "a", tmp_path / "b")
    ours, theirs, got = (doubles(one) for one in (base, tuned, tmp_path / "a"))
    covariances = [_read(old.with_name("fisher.activations.safetensors")), _read(beside)]
    assert covariances[0].keys() == covariances[1].keys()
    for name, c_old in covariances[0].items():
        d, turned = theirs[name] - ours[name], architecture == "gpt2"  # float32 leaves C_o a little indefinite
        wanted = solved(d.T if turned else d, covariances[1][name], c_old, 1.0)
        difference = got[name] - ours[name] - (wanted.T if turned else wanted)
        assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(wanted), name


def _read(path: Path) -> dict[str, Doubles]:
    from fisherkit.artefacts.covariance_file import CovarianceFile

    with CovarianceFile(path) as file:
        names = {weight: file.covariance_of(weight, "input") for weight in file.weights("input")}
        return {weight: file.read(name).values.astype(np.float64) for weight, name in names.items() if name}


# Several fine-tunes


def test_several_fine_tunes_in_any_order(wide: Pair, tmp_path: Path) -> None:
    other = pairs.fine_tune(wide[0], tmp_path / "other", seed=7)
    old, new = files(tmp_path, wide)
    second = covariance_files.write(tmp_path / "second.safetensors", inputs(3), model=other)
    base = wide[0]
    worked(cli("merge", *wide, tmp_path / "one", "--regmean", old, new, "--also", other, second))
    worked(cli("merge", base, other, tmp_path / "two", "--regmean", old, second, "--also", wide[1], new))
    worked(cli("merge", *wide, tmp_path / "three", "--regmean", "none", new, "--also", other, second))
    ours, theirs, others, one, two, three = (
        doubles(path) for path in (*wide, other, *(tmp_path / name for name in ("one", "two", "three")))
    )
    c_old, c_new, c_second = (by_weight(inputs(seed)) for seed in (1, 2, 3))
    for name in ours:
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-7)
        if name not in c_old:
            np.testing.assert_allclose(one[name], (theirs[name] + others[name]) / 2, rtol=0, atol=1e-7)
            continue
        grams = [c + MU * np.trace(c) / len(c) * np.eye(len(c)) for c in (c_new[name], c_second[name])]
        mixed = theirs[name] @ grams[0] + others[name] @ grams[1]
        wanted = mixed @ np.linalg.inv(grams[0] + grams[1])
        np.testing.assert_allclose(three[name], wanted, rtol=0, atol=1e-6)
        all_of_them = (mixed + ours[name] @ c_old[name]) @ np.linalg.inv(grams[0] + grams[1] + c_old[name])
        np.testing.assert_allclose(one[name], all_of_them, rtol=0, atol=1e-6)


def test_old_and_new_in_each_others_place_are_refused(wide: Pair, tmp_path: Path) -> None:
    old, new = files(tmp_path, wide)
    done = cli("merge", *wide, tmp_path / "out", "--regmean", new, old)
    assert "was measured on FT, and NEW on BASE: OLD comes first" in one_line(done)
    worked(cli("merge", *wide, tmp_path / "out", "--regmean", new, old, "--force-model"))


def test_fine_tunes_count_by_their_weights(wide: Pair, tmp_path: Path) -> None:
    other = pairs.fine_tune(wide[0], tmp_path / "other", seed=7)
    _, new = files(tmp_path, wide)
    second = covariance_files.write(tmp_path / "second.safetensors", inputs(3), model=other)
    words = ("--regmean", "none", new, "--also", other, second, "--weights", "1,3")
    worked(cli("merge", *wide, tmp_path / "out", *words))
    theirs, others, got = (doubles(path) for path in (wide[1], other, tmp_path / "out"))
    c_new, c_second = by_weight(inputs(2)), by_weight(inputs(3))
    for name in got:
        if name not in c_new:
            np.testing.assert_allclose(got[name], (theirs[name] + 3 * others[name]) / 4, rtol=0, atol=1e-7)
            continue
        g, h = (c + MU * np.trace(c) / len(c) * np.eye(len(c)) for c in (c_new[name], c_second[name]))
        wanted = (theirs[name] @ g + 3 * others[name] @ h) @ np.linalg.inv(g + 3 * h)
        np.testing.assert_allclose(got[name], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "match"),
    [((1.0,), "1 numbers for FT and 1 of --also"), ((1.0, 0.0), "above 0"), ((1.0, float("nan")), "above 0")],
)
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        MergeOptions(regmean=("old", "new"), also=(("other", "second"),), weights=weights)  # type: ignore[arg-type]


def test_an_adapter_is_a_fine_tune(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("llama")
    adapter = peft_adapters.train(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    old = covariance_files.write(tmp_path / "old.safetensors", inputs(1), model=base)
    new = covariance_files.write(tmp_path / "new.safetensors", inputs(2), model=base)
    worked(cli("merge", base, adapter, tmp_path / "plain"))
    worked(cli("merge", base, adapter, tmp_path / "out", "--regmean", old, new))
    ours, theirs, got = (doubles(one) for one in (base, tmp_path / "plain", tmp_path / "out"))
    c_old, c_new = by_weight(inputs(1)), by_weight(inputs(2))
    for name, tensor in got.items():
        d = theirs[name] - ours[name]
        wanted = solved(d, c_new[name], c_old[name], 1.0) if name in c_old else d
        np.testing.assert_allclose(tensor - ours[name], wanted, rtol=0, atol=1e-6)
    other = peft_adapters.train(base, tmp_path / "other", target_modules=["k_proj"])
    line = one_line(cli("merge", base, adapter, tmp_path / "no", "--regmean", old, new, "--also", other, new))
    assert "other: changes 3 tensors that FT leaves alone" in line


def test_strengths_of_a_sweep_share_their_decompositions(
    wide: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each gives what a run of its own writes."""
    calls: list[int] = []
    plain = regmean.decompose
    monkeypatch.setattr(regmean, "decompose", lambda *given: (calls.append(1), plain(*given))[1])
    options = [MergeOptions(regmean=files(tmp_path, wide), old_weight=weight) for weight in (0.1, 1.0, 10.0)]
    with open_merge_points(*wide, options) as points:
        held = [np.empty(32 * 48, np.float32) for _ in options]
        for point, values in zip(points.virtual, held, strict=True):
            point.read_into(DOWN.format(1), values)
    assert len(calls) == 1
    worked(cli("merge", *wide, tmp_path / "out", "--regmean", *files(tmp_path, wide), "--old-weight", 10))
    written = pairs.tensors(tmp_path / "out")[DOWN.format(1)].numpy()
    assert np.array_equal(held[2], written.reshape(-1))
    assert not np.array_equal(held[1], held[2])


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_the_figure_draws_the_filter_of_each_weight(suffix: str, wide: Pair, tmp_path: Path) -> None:
    figure = tmp_path / f"figure.{suffix}"
    done = cli("merge", *wide, tmp_path / "out", "--regmean", *files(tmp_path, wide), "--figure", figure, "--json")
    report, text = json.loads(worked(done)), figure.read_text()
    if suffix == "svg":
        ElementTree.fromstring(text)  # noqa: S314  # of our own making
    row = report["tensors"][DOWN.format(2)]["regmean"]["gains"]
    assert f"layer 2, mlp.down_proj: {row[0]:.1%} to {row[-1]:.1%} kept" in text
    assert "layer 1: " in text
    assert f"{report['totals']['regmean']['old_kept']:.1%} on old ones" in text


def test_figures_without_a_solve_are_refused(wide: Pair, tmp_path: Path) -> None:
    words = ("--regmean", *files(tmp_path, wide))
    assert "ends in .html or .svg" in one_line(cli("merge", *wide, tmp_path / "o", *words, "--figure", "f.png"), 2)
    assert "--figure draws" in one_line(cli("merge", *wide, tmp_path / "o", "--figure", "f.svg"), 2)


# An adapter besides


def through_peft(base: Path, adapter: Path) -> dict[str, Doubles]:
    """Weights of the base with the adapter merged by peft."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_adapter_besides_is_the_solved_delta_where_its_rank_suffices(
    architecture: str, checkpoint: Callable[[str], Path], measured: Callable[[str], Path], tmp_path: Path
) -> None:
    base, fisher, out = checkpoint(architecture), measured(architecture), tmp_path / "out"
    tuned = pairs.fine_tune(base, tmp_path / "tuned")
    report = json.loads(
        worked(cli("merge", base, tuned, out, "--regmean", fisher, fisher, "--lora-rank", 48, "--json"))
    )
    solved_for = {name for name, row in report["tensors"].items() if "regmean" in row}
    assert {f"{out}/lora/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")} <= set(
        report["files"]
    )
    got, ours, lora = doubles(out), doubles(base), through_peft(base, out / "lora")
    for name in got:
        wanted = got[name] if name in solved_for else ours[name]
        np.testing.assert_allclose(lora[name], wanted, rtol=0, atol=1e-5, err_msg=name)
    worked(cli("merge", base, out / "lora", tmp_path / "again"))  # and so do we
    AutoModelForCausalLM.from_pretrained(out)
    worked(cli("merge", base, tuned, out, "--regmean", fisher, fisher, "--lora-rank", 2, "--force"))


def test_an_adapters_rank_suffices_for_its_repair(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("llama")
    adapter = peft_adapters.train(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], r=4)
    old = covariance_files.write(tmp_path / "old.safetensors", inputs(1), model=base)
    new = covariance_files.write(tmp_path / "new.safetensors", inputs(2), model=base)
    words = ("--regmean", old, new, "--lora-rank", 4, "--alpha", 0.5, "--json")
    report = json.loads(worked(cli("merge", base, adapter, tmp_path / "out", *words)))
    held = {row["regmean"]["lora_held"] for row in report["tensors"].values()}
    assert min(held) == pytest.approx(1, abs=1e-6)
    got, lora = doubles(tmp_path / "out"), through_peft(base, tmp_path / "out" / "lora")
    for name in got:
        np.testing.assert_allclose(lora[name], got[name], rtol=0, atol=1e-5)
    line = one_line(cli("merge", base, adapter, tmp_path / "one.safetensors", *words), 2)
    assert "one.safetensors is a file; the adapter needs a folder" in line


# Faults


def test_a_killed_run_goes_on_to_the_same_bits(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    other = pairs.fine_tune(pair[0], tmp_path / "other", seed=7)
    old, new = files(tmp_path, pair)
    options = {"regmean": (old, new), "also": ((str(other), new),), "force_model": True, "lora_rank": 3}
    steps: list[int] = []
    fisherkit.merge(*pair, tmp_path / "whole", MergeOptions(**options), track=lambda *step: steps.append(1))
    for at in (1, len(steps) // 2, len(steps) - 2):
        out = tmp_path / f"killed{at}"
        with pytest.raises(Killed):
            fisherkit.merge(*pair, out, MergeOptions(**options), track=killed_after(at))
        assert not out.exists()
        fisherkit.merge(*pair, out, MergeOptions(**options, resume=True))
        assert pairs.same_checkpoint(out, tmp_path / "whole")
        assert pairs.files(out / "lora") == pairs.files(tmp_path / "whole" / "lora")


def test_files_that_do_not_belong_are_refused(wide: Pair, tmp_path: Path) -> None:
    old, new = files(tmp_path, wide)

    def refused(*words: object, code: int = 1) -> str:
        line = one_line(cli("merge", *wide, tmp_path / "out", *words), code)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        return line

    shutil.copytree(wide[0], tmp_path / "third")
    pairs.edit(tmp_path / "third", DOWN.format(0), lambda tensor: tensor + 1)
    third = covariance_files.write(tmp_path / "third.safetensors", inputs(2), model=tmp_path / "third")
    assert "third.safetensors: was measured on another model than BASE" in refused("--regmean", third, new)
    assert "third.safetensors: was measured on another model than BASE" in refused("--regmean", old, third)
    worked(cli("merge", *wide, tmp_path / "forced", "--regmean", old, third, "--force-model"))
    narrow = covariance_files.write(tmp_path / "narrow.safetensors", {(DOWN.format(0),): np.ones((3, 32))})
    assert "has 32 channels, and model.layers.0.mlp.down_proj.weight has 48" in refused("--regmean", old, narrow)
    one = covariance_files.write(tmp_path / "one.safetensors", {(DOWN.format(0),): np.ones((3, 48))})
    two = covariance_files.write(tmp_path / "two.safetensors", {(DOWN.format(1),): np.ones((3, 48))})
    assert "have covariances of no weight in common" in refused("--regmean", one, two)
    assert "none.json: is missing" in refused("--regmean", old, tmp_path / "none.safetensors")
    assert "no file of covariances" in refused("--regmean", old, tmp_path / "none.txt")
    assert "--regmean and --mask are two ways to merge" in refused("--regmean", old, new, "--mask", old, code=2)
    assert "add them with --also" in refused("--regmean", "none", new, code=2)
    assert "--lora-rank is for --regmean" in refused("--lora-rank", 3, code=2)
    assert "--also is for --regmean and --fisher" in refused("--also", wide[1], new, code=2)
    assert "is given twice" in refused("--regmean", old, new, "--also", wide[1], new)
    assert "--old-weight must lie between 0" in refused("--regmean", old, new, "--old-weight", -1, code=2)
    assert "--damping must lie between 1e-12" in refused("--regmean", old, new, "--damping", 0, code=2)
    assert "belongs to an input" in one_line(cli("merge", *wide, new, "--regmean", old, new, "--force"))


def test_values_that_are_not_finite_are_refused_or_the_bases(wide: Pair, tmp_path: Path) -> None:
    old, new = files(tmp_path, wide)
    broken = tmp_path / "broken"
    shutil.copytree(wide[1], broken)
    name = DOWN.format(1)
    pairs.edit(broken, name, lambda tensor: pairs.put(tensor, float("nan"), 5, 70))
    words = ("--regmean", old, new, "--force-model")
    assert "has 2 NaN or infinite entries, the first at index 5" in one_line(
        cli("merge", wide[0], broken, tmp_path / "out", *words)
    )
    worked(cli("merge", wide[0], broken, tmp_path / "out", *words, "--nan", "keep-base"))
    ours, got = doubles(wide[0])[name].reshape(-1), doubles(tmp_path / "out")[name].reshape(-1)
    assert np.isfinite(got).all()
    assert (got[[5, 70]] == ours[[5, 70]]).all()
