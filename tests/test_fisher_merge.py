"""``fisherkit merge --fisher`` against a few lines of numpy."""

import json
from collections.abc import Mapping
from pathlib import Path

import covariance_files
import numpy as np
import pairs
import pytest
import safetensors.torch
import torch
from kills import Killed, killed_after
from numpy.typing import NDArray
from pairs import Pair, cli, one_line, worked

import fisherkit
from fisherkit.checkpoint.index import open_index
from fisherkit.options import MergeOptions
from fisherkit.pairs import rewrite

Doubles = NDArray[np.float64]
MU = 1e-6
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A llama in float32 and its fine-tune."""
    return pairs.make(tmp_path_factory.mktemp("wide"), dtype=torch.float32)


def fisher_file(path: Path, base: Path, seed: int, *, model: Path | None = None) -> dict[str, Doubles]:
    """A Fisher of the matrices as float64, and written in bfloat16, as extract does it."""
    generator = torch.Generator().manual_seed(seed)
    held = {
        name: (torch.randn(tensor.shape, generator=generator).square() * 1e-6).bfloat16()
        for name, tensor in pairs.tensors(base).items()
        if tensor.ndim > 1 and ".layers." in name
    }
    if path.suffix == ".pt":
        torch.save(held, path)
    else:
        safetensors.torch.save_file(held, path, metadata={"format": "pt"})
    if model is not None:
        about = {"model": {"weights_sha256": open_index(model).fingerprint()}}
        path.with_suffix(".json").write_text(json.dumps(about))
    return {name: tensor.double().numpy() for name, tensor in held.items()}


def doubles(checkpoint: Path) -> dict[str, Doubles]:
    return {name: tensor.double().numpy() for name, tensor in pairs.tensors(checkpoint).items()}


def damped(fisher: Mapping[str, Doubles], name: str) -> Doubles:
    return fisher[name] + MU * fisher[name].mean()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("lam", [0, 0.3, 1000])
def test_each_entry_is_the_mean_that_the_fishers_weigh(lam: float, suffix: str, wide: Pair, tmp_path: Path) -> None:
    paths = tmp_path / f"old{suffix}", tmp_path / f"new{suffix}"
    old, new = (fisher_file(path, wide[0], seed) for seed, path in enumerate(paths))
    done = cli("merge", *wide, tmp_path / "out", "--fisher", *paths, "--old-weight", lam, "--json")
    report = json.loads(worked(done))
    ours, theirs, got = (doubles(one) for one in (*wide, tmp_path / "out"))
    for name, tensor in got.items():
        d = theirs[name] - ours[name]
        if name in old:
            known = damped(new, name)
            d = d * known / (known + lam * old[name])
            assert report["tensors"][name]["fisher"]["old_weight"] == lam
        np.testing.assert_allclose(tensor, ours[name] + d, rtol=0, atol=1e-7)
    assert sorted(report["rules"]["not_solved"]) == sorted(set(got) - set(old))
    assert "% is left on new inputs and" in done.stderr
    if lam == 0:
        assert pairs.same_checkpoint(tmp_path / "out", wide[1])
        assert report["totals"]["fisher"]["old_kept"] == 1


def test_several_fine_tunes_in_any_order(wide: Pair, tmp_path: Path) -> None:
    other = pairs.fine_tune(wide[0], tmp_path / "other", seed=7)
    paths = [tmp_path / f"{name}.safetensors" for name in ("old", "new", "second")]
    old, new, second = (fisher_file(path, wide[0], seed) for seed, path in enumerate(paths))
    worked(cli("merge", *wide, tmp_path / "one", "--fisher", *paths[:2], "--also", other, paths[2]))
    words = ("--fisher", paths[0], paths[2], "--also", wide[1], paths[1])
    worked(cli("merge", wide[0], other, tmp_path / "two", *words))
    worked(cli("merge", *wide, tmp_path / "three", "--fisher", "none", paths[1], "--also", other, paths[2]))
    ours, theirs, others, one, two, three = (
        doubles(path) for path in (*wide, other, *(tmp_path / name for name in ("one", "two", "three")))
    )
    for name in ours:
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-7)
        if name in old:
            f, g = damped(new, name), damped(second, name)
            mixed = f * theirs[name] + g * others[name]
            np.testing.assert_allclose(three[name], mixed / (f + g), rtol=0, atol=1e-7)
            mixed += old[name] * ours[name]
            np.testing.assert_allclose(one[name], mixed / (f + g + old[name]), rtol=0, atol=1e-7)


def test_fine_tunes_count_by_their_weights(wide: Pair, tmp_path: Path) -> None:
    other = pairs.fine_tune(wide[0], tmp_path / "other", seed=7)
    paths = [tmp_path / f"{name}.safetensors" for name in ("new", "second")]
    new, second = (fisher_file(path, wide[0], seed) for seed, path in enumerate(paths))
    words = ("--fisher", "none", paths[0], "--also", other, paths[1], "--weights", "1,3")
    worked(cli("merge", *wide, tmp_path / "out", *words))
    theirs, others, got = (doubles(path) for path in (wide[1], other, tmp_path / "out"))
    for name in new:
        f, g = damped(new, name), damped(second, name)
        wanted = (f * theirs[name] + 3 * g * others[name]) / (f + 3 * g)
        np.testing.assert_allclose(got[name], wanted, rtol=0, atol=1e-7)


def test_fishers_of_zeros_leave_the_fine_tune(wide: Pair, tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in pairs.tensors(wide[0]).items()}
    path = tmp_path / "zeros.safetensors"
    safetensors.torch.save_file(zeros, path, metadata={"format": "pt"})
    worked(cli("merge", *wide, tmp_path / "out", "--fisher", path, path))
    assert pairs.same_checkpoint(tmp_path / "out", wide[1])
    fisher_file(tmp_path / "old.safetensors", wide[0], 0)
    worked(cli("merge", *wide, tmp_path / "base", "--fisher", tmp_path / "old.safetensors", path, "--rest", "base"))
    ours, got = doubles(wide[0]), doubles(tmp_path / "base")
    moved = np.mean([np.abs(ours[name] - got[name]).mean() for name in ours])
    assert moved < 1e-4  # the task needs none of these weights


def test_a_killed_run_goes_on_to_the_same_bits(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    paths = tmp_path / "old.safetensors", tmp_path / "new.pt"
    for seed, path in enumerate(paths):
        fisher_file(path, pair[0], seed)
    fisherkit.merge(*pair, tmp_path / "whole", MergeOptions(fisher=paths))
    with pytest.raises(Killed):
        fisherkit.merge(*pair, tmp_path / "out", MergeOptions(fisher=paths), track=killed_after(9))
    fisherkit.merge(*pair, tmp_path / "out", MergeOptions(fisher=paths, resume=True))
    assert pairs.same_checkpoint(tmp_path / "out", tmp_path / "whole")


def test_old_and_new_in_each_others_place_are_refused(wide: Pair, tmp_path: Path) -> None:
    paths = tmp_path / "of_base.safetensors", tmp_path / "of_tuned.safetensors"
    for seed, (path, model) in enumerate(zip(paths, wide, strict=True)):
        fisher_file(path, wide[0], seed, model=model)
    done = cli("merge", *wide, tmp_path / "out", "--fisher", *reversed(paths))
    assert "of_tuned.safetensors: was measured on FT, and NEW on BASE: OLD comes first" in one_line(done)
    assert not (tmp_path / "out").exists()
    worked(cli("merge", *wide, tmp_path / "forced", "--fisher", *reversed(paths), "--force-model"))
    worked(cli("merge", *wide, tmp_path / "out", "--fisher", *paths))


@pytest.mark.parametrize("place", [0, 1])
def test_covariances_in_place_of_a_fisher_are_refused(place: int, wide: Pair, tmp_path: Path) -> None:
    fisher_file(tmp_path / "f.safetensors", wide[0], 0)
    rows = np.random.default_rng(0).standard_normal((9, 32))
    covariances = covariance_files.write(tmp_path / "c.safetensors", {(Q0,): rows}, model=wide[0])
    paths = [tmp_path / "f.safetensors"] * 2
    paths[place] = covariances
    line = one_line(cli("merge", *wide, tmp_path / "out", "--fisher", *paths))
    assert "c.safetensors: holds covariances, which --regmean takes; --fisher takes a Fisher" in line


def test_fishers_that_do_not_belong_are_refused(wide: Pair, tmp_path: Path) -> None:
    good, bad, other = (tmp_path / f"{name}.safetensors" for name in ("good", "bad", "other"))
    held = fisher_file(good, wide[0], 0, model=wide[0])
    fisher_file(other, wide[0], 1, model=good)
    line = one_line(cli("merge", *wide, tmp_path / "out", "--fisher", good, other))
    assert "other.safetensors: was measured on another model than BASE and its fine-tune" in line
    worked(cli("merge", *wide, tmp_path / "forced", "--fisher", good, other, "--force-model"))
    name = min(held)
    for change, what in (
        (lambda tensor: tensor[:-1], "in BASE; it is a Fisher of another model"),
        (lambda tensor: -tensor, "has values that no Fisher has"),
        (lambda tensor: tensor * float("nan"), "has values that no Fisher has"),
    ):
        values = {key: torch.from_numpy(value) for key, value in held.items()}
        values[name] = change(values[name]).contiguous()
        safetensors.torch.save_file(values, bad, metadata={"format": "pt"})
        line = one_line(cli("merge", *wide, tmp_path / "out", "--fisher", good, bad))
        assert what in line
        assert name in line
    safetensors.torch.save_file({"elsewhere": torch.ones(3)}, bad, metadata={"format": "pt"})
    assert "speak of no weight in common" in one_line(cli("merge", *wide, tmp_path / "out", "--fisher", good, bad))
    assert "are two ways" in one_line(
        cli("merge", *wide, tmp_path / "out", "--fisher", good, good, "--regmean", good, good), 2
    )
    assert not (tmp_path / "out").exists()
