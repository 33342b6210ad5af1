"""Strengths of a soft subspace's pull: the root of the energy over its mean, at the ends of its range too."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pull_oracle import PULL, close, held, step, strengths, three_weights, write
from training_runs import copies

from fisherkit.kernels.pull import pull_strengths, pulled_share
from fisherkit.training import constrain


def test_strengths_are_the_pull_times_the_root_of_the_energy_over_its_mean() -> None:
    energies = np.array([4.0, 1.0, 0.25, 0.0], np.float32)
    found = pull_strengths(0.3, energies, 7)
    assert found.dtype == np.float32
    assert found == pytest.approx(strengths(0.3, energies.tolist(), 7), rel=1e-6)
    stacked = pull_strengths(0.3, np.stack([energies, 10 * energies, 0 * energies]), 7)
    assert stacked[:2] == pytest.approx(np.stack([found, found]), rel=1e-6)  # the scale of the inputs says nothing
    assert (stacked[2] == 0).all()
    assert pulled_share(found) == pytest.approx([s / (1 + s) for s in found], rel=1e-6)


@pytest.mark.parametrize("size", [1, 5])
def test_all_directions_with_equal_energy_are_pulled_as_told(size: int) -> None:
    assert pull_strengths(0.2, np.full(size, 3.0, np.float32), size) == pytest.approx([0.2] * size)


def test_one_direction_of_many_and_none_at_all() -> None:
    assert pull_strengths(0.2, np.array([1e-30], np.float32), 9) == pytest.approx([0.2 * 3])
    assert (pull_strengths(0.2, np.zeros(4, np.float32), 9) == 0).all()
    assert pull_strengths(0.2, np.zeros(0, np.float32), 9).shape == (0,)


@pytest.mark.parametrize("rank", [1, 10])
def test_the_ends_of_the_number_of_directions(rank: int, tmp_path: Path) -> None:
    model = three_weights()
    pulls = write(tmp_path / "s.safetensors", held(model), rank=rank, energies=torch.ones)
    expected = PULL * math.sqrt(10 / rank)
    assert pulls["one"][1] == pytest.approx([expected] * rank)
    start = copies(held(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model, tmp_path / "s.safetensors")
    step(model, optimizer, 1)
    for name, weight in held(model).items():
        moved = -0.1 * weight.grad.double()  # type: ignore[union-attr]
        q = pulls[name][0]
        inside = moved @ q @ q.T
        wanted = start[name].double() + moved - inside + inside / (1 + expected)
        torch.testing.assert_close(weight.detach().double(), wanted, rtol=0, atol=1e-6)


def test_columns_of_zeros_and_a_spectrum_of_zeros_do_nothing(tmp_path: Path) -> None:
    ends = []
    for number, changes in enumerate(({}, {"zeros": 3}, {"energies": torch.zeros}, None)):
        model = three_weights()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if changes is not None:
            write(tmp_path / f"{number}.safetensors", held(model), **changes)
            constrain(optimizer, model, tmp_path / f"{number}.safetensors")
        for seed in range(3):
            step(model, optimizer, seed)
        ends.append(copies(dict(model.named_parameters())))
    plain, padded, without, free = ends
    close(padded, plain, 1e-6)
    assert all(torch.equal(without[name], free[name]) for name in free)
    assert float((plain["one"] - free["one"]).norm()) > 0.1
