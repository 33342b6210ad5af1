"""Covariances of parts add up to those of all samples, whole or as factors, beside a Fisher or alone.

The oracle for whole ones is the undivided run; for factors the best factor of the sum, from its eigenvalues.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fisherkit
from fisherkit import CombineOptions, ExtractOptions
from fisherkit.artefacts.covariance_file import CovarianceFile, path_beside
from fisherkit.errors import CheckpointError, OutputError
from fisherkit.kernels.covariance_sum import sum_of_factors, sum_of_wholes

Checkpoint = Callable[[str], Path]


def extract(model: Path, prompts: Path, out: Path, **changes: Any) -> Path:
    fisherkit.extract(model, prompts, out, ExtractOptions(group_size=2, **{"statistics": "activations", **changes}))
    return out


def covariances(path: Path) -> dict[str, Any]:
    with CovarianceFile(path) as file:
        return {name: (file.read(name), file.rows[name]) for name in file.rows}


@pytest.mark.parametrize("statistics", ["activations", "inputs"])
def test_covariances_of_parts_are_those_of_all_samples(
    statistics: Any, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    parts = [
        extract(model, prompts, tmp_path / f"part-{number}.safetensors", statistics=statistics, shard=(number, 2))
        for number in (1, 2)
    ]
    whole = extract(model, prompts, tmp_path / "whole.safetensors", statistics=statistics)
    report = fisherkit.combine(parts, tmp_path / "sum.safetensors")
    ours, theirs = (path if statistics == "inputs" else path_beside(path) for path in (report.path, whole))
    assert ours in report.files
    got, wanted = covariances(ours), covariances(theirs)
    assert got.keys() == wanted.keys()
    for name, (read, row) in got.items():
        other, other_row = wanted[name]
        np.testing.assert_allclose(read.values, other.values, rtol=1e-4, atol=1e-5 * np.abs(other.values).max())
        assert row["tokens"] == other_row["tokens"]
        assert row["trace"] == pytest.approx(other_row["trace"], rel=1e-5)
    made = json.loads(ours.with_suffix(".json").read_bytes())
    assert [one["part"] for one in made["combined"]["parts"]] == ["1/2", "2/2"]


def test_a_mask_of_directions_is_made_of_a_combined_file(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    parts = [
        extract(checkpoint("llama"), prompts, tmp_path / f"part-{number}.safetensors", shard=(number, 2))
        for number in (1, 2)
    ]
    fisher = fisherkit.combine(parts, tmp_path / "sum.safetensors").path
    options = fisherkit.MaskOptions(basis="activation", svd_energy=0.9)
    assert fisherkit.mask(fisher, tmp_path / "directions.safetensors", options).modes


def test_covariances_beside_some_parts_alone_are_left_out_and_said(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    kinds = ("activations", "fisher")
    parts = [
        extract(
            checkpoint("llama"), prompts, tmp_path / f"{number}.pt", shard=(number, 2), statistics=kinds[number - 1]
        )
        for number in (1, 2)
    ]
    said: list[str] = []
    report = fisherkit.combine(parts, tmp_path / "sum.pt", say=said.append)
    assert said == ["warning: covariances lie beside 1 of 2 parts, and are left out"]
    assert not path_beside(report.path).exists()


def test_inputs_are_added_to_a_safetensors_file_alone(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    parts = [
        extract(checkpoint("llama"), prompts, tmp_path / f"{n}.safetensors", statistics="inputs", shard=(n, 2))
        for n in (1, 2)
    ]
    with pytest.raises(OutputError, match="covariances are written as"):
        fisherkit.combine(parts, tmp_path / "sum.pt")
    fisher = extract(checkpoint("llama"), prompts, tmp_path / "fisher.safetensors", statistics="fisher", shard=(2, 2))
    with pytest.raises(CheckpointError, match=r"1.safetensors: holds covariances of inputs, and others a Fisher"):
        fisherkit.combine([parts[0], fisher], tmp_path / "sum.safetensors")


def test_weights_of_the_caller_weigh_covariances_too(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("Two and two make four.\nThe Po is a river in Italy.\n")
    parts = [
        extract(checkpoint("llama"), source, tmp_path / f"{n}.safetensors", statistics="inputs")
        for n, source in enumerate((prompts, text))
    ]
    total = fisherkit.combine(parts, tmp_path / "sum.safetensors", CombineOptions(weights=(1, 3))).path
    first, second = (covariances(path) for path in parts)
    for name, (read, _) in covariances(total).items():
        wanted = 0.25 * first[name][0].values.astype(float) + 0.75 * second[name][0].values.astype(float)
        np.testing.assert_allclose(read.values, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_a_sum_of_factors_is_the_best_factor_of_the_sum() -> None:
    draw = np.random.default_rng(0)
    factors = [draw.normal(size=(20, 5)).astype(np.float32) * [9, 5, 1, 0.1, 0.01] for _ in range(2)]
    weights = [0.3, 0.7]
    total = sum(w * f.astype(float) @ f.T.astype(float) for w, f in zip(weights, factors, strict=True))
    values, vectors = np.linalg.eigh(total)
    best = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    got = sum_of_factors(weights, [factor.astype(np.float32) for factor in factors])
    np.testing.assert_allclose(got @ got.T, best, rtol=1e-5, atol=1e-4)
    products = got.T @ got
    assert np.abs(products - np.diag(np.diagonal(products))).max() < 1e-9 * products.max()
    assert (np.diff(np.diagonal(products)) <= 0).all()


def test_sums_of_one_factor_or_of_many_equal_ones_change_nothing() -> None:
    factor = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 4)))[0].astype(np.float32) * [4, 3, 2, 1]
    factor = factor.astype(np.float32)
    for count in (1, 2, 5):
        got = sum_of_factors([1 / count] * count, [factor] * count)
        np.testing.assert_allclose(got @ got.T, factor.astype(float) @ factor.T.astype(float), atol=1e-5)
    whole = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(sum_of_wholes([0.5, 0.5], [whole, whole]), whole)
    np.testing.assert_array_equal(sum_of_wholes([0.0], [whole]), np.zeros(6))
