"""Subspaces: the modes of a full decomposition in float64, for every basis, and nothing where there are none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_oracle import fisher_arrays, write

from fisherkit import MaskOptions, MaskReport, inspect, mask
from fisherkit.artefacts.mask_file import StoredModes, open_mask
from fisherkit.errors import CheckpointError, OptionError

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def run(folder: Path, arrays: dict[str, np.ndarray], **options: Any) -> MaskReport:
    fisher = write(folder / "fisher.safetensors", arrays, architecture="LlamaForCausalLM")
    return mask(fisher, folder / "sub.safetensors", MaskOptions(**options))


def modes(report: MaskReport, name: str) -> StoredModes:
    with open_mask(report.path) as file:
        return file.modes(name, file.shape(name))


BASES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "fisher": lambda f, w, t: f,
    "sqrt-fisher": lambda f, w, t: np.sqrt(f),
    "weight": lambda f, w, t: w,
    "fisher-weight": lambda f, w, t: np.sqrt(f) * w,
    "delta": lambda f, w, t: t - w,
}


@pytest.mark.parametrize("basis", BASES)
def test_modes_are_those_of_a_full_decomposition(basis: str, tmp_path: Path) -> None:
    arrays = fisher_arrays(rounded=False)
    generator = np.random.default_rng(2)
    weights, tuned = (
        {n: generator.standard_normal(a.shape).astype(np.float32) for n, a in arrays.items()} for _ in "wt"
    )
    given: dict[str, Any] = {"basis": basis}
    if basis not in ("fisher", "sqrt-fisher"):
        given["weights"] = str(write(tmp_path / "w.safetensors", weights))
    if basis == "delta":
        given["delta"] = str(write(tmp_path / "t.safetensors", tuned))
    report = run(tmp_path, arrays, svd_rank=3, **given)
    for name in (Q, DOWN):
        matrix = BASES[basis](*(one[name].astype(np.float64) for one in (arrays, weights, tuned)))
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        found = modes(report, name)
        assert found.u is not None
        assert found.s is not None
        assert found.v is not None
        assert np.allclose(found.s, s[:3], rtol=1e-4)
        assert np.allclose(found.u @ found.u.T, u[:, :3] @ u[:, :3].T, atol=1e-3)
        assert np.allclose(found.v @ found.v.T, vt[:3].T @ vt[:3], atol=1e-3)
        assert np.allclose(found.u.T @ found.u, np.eye(3), atol=1e-5)


def test_energy_decides_the_rank_and_is_reported(tmp_path: Path) -> None:
    arrays = fisher_arrays(rounded=False)
    report = run(tmp_path, arrays, svd_energy=0.8)
    for name in (Q, DOWN):
        shares = np.cumsum(np.linalg.svd(arrays[name].astype(np.float64), compute_uv=False) ** 2)
        found = modes(report, name)
        assert found.s is not None
        assert len(found.s) == 1 + np.argmax(shares / shares[-1] >= 0.8)
    row = next(row for row in inspect(report.path, by="tensor").rows if row.name == DOWN)
    values = np.linalg.svd(arrays[DOWN].astype(np.float64), compute_uv=False) ** 2
    shares = values / values.sum()
    assert row.mean == pytest.approx(shares[: int(row.rank)].sum(), rel=1e-3)
    assert 1 <= row.effective_rank <= np.exp(-(shares * np.log(shares)).sum()) + 1e-3
    assert report.energy is not None
    assert 0.8 <= report.energy <= 1


@pytest.mark.parametrize(("side", "stored"), [("both", "USV"), ("left", "US"), ("right", "SV")])
def test_a_side_may_be_left_out(side: str, stored: str, tmp_path: Path) -> None:
    found = modes(run(tmp_path, fisher_arrays(), svd_rank=2, side=side), Q)
    assert "".join(name for name, part in zip("USV", found, strict=True) if part is not None) == stored


def test_experts_have_modes_of_their_own_and_one_without_gradient_has_none(tmp_path: Path) -> None:
    experts = np.random.default_rng(0).random((3, 6, 5)).astype(np.float32)
    experts[1] = 0
    found = modes(run(tmp_path, {EXPERTS: experts}, svd_rank=2), EXPERTS)
    assert found.u is not None
    assert found.s is not None
    assert not found.u[1].any()
    assert not found.s[1].any()
    for expert in (0, 2):
        u = np.linalg.svd(experts[expert].astype(np.float64))[0][:, :2]
        assert np.allclose(found.u[expert] @ found.u[expert].T, u @ u.T, atol=1e-3)


def test_what_has_no_directions_is_left_out_and_noted(tmp_path: Path) -> None:
    arrays = fisher_arrays(1)
    arrays[Q][:] = 0
    report = run(tmp_path, arrays, svd_rank=7)
    with open_mask(report.path) as file:
        assert set(file.names) == {DOWN, "lm_head.weight"}
    assert report.unreached == (Q,)
    assert f"zero throughout, so without directions to protect: {Q}" in report.notes
    assert any(note.startswith("left out, being no matrices: 1 of") for note in report.notes)
    assert any(note.startswith("all directions are protected") for note in report.notes)


def test_ranks_and_files_without_modes_are_refused(tmp_path: Path) -> None:
    arrays = fisher_arrays()
    with pytest.raises(OptionError, match=r"--svd-rank 8.*at most 7"):
        run(tmp_path, arrays, svd_rank=8)
    with pytest.raises(CheckpointError, match="every matrix is zero"):
        run(tmp_path, {name: np.zeros_like(a) for name, a in arrays.items()}, svd_rank=2)
    with pytest.raises(CheckpointError, match="holds no matrices"):
        run(tmp_path, {"model.norm.weight": np.ones(4, np.float32)}, svd_rank=2)
    arrays[Q][1, 2] = np.nan
    with pytest.raises(CheckpointError, match=r"q_proj.weight.*NaN.*index 9\b"):
        run(tmp_path, arrays, svd_rank=2)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_subspace_shows_what_it_holds(tmp_path: Path) -> None:
    summary = inspect(run(tmp_path, fisher_arrays(), svd_rank=2).path)
    assert summary.kind == "subspace"
    assert summary.columns == ("layer", "tensors", "weights", "rank", "energy", "effective_rank")
    assert [row.rank for row in summary.rows] == [2.0] * 4
    assert all(0 < row.mean <= 1 for row in summary.rows)
    with pytest.raises(OptionError, match=r"subspaces.*not compared"):
        inspect(summary.path, summary.path)
