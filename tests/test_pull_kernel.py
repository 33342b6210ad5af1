"""Strengths of a soft subspace's pull: the root of the energy over its mean, at the ends of its range too."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pull_oracle import PULL, close, held, step, strengths, three_weights, write
from training_runs import copies

from fisherkit.errors import OptionError
from fisherkit.kernels.pull import pull_strengths, pulled_share
from fisherkit.training import constrain


def left(strength: float) -> float:
    """(1 - exp(-s)) / s, the slow way: a constant update and an exponential pull over a course of a million steps."""
    return (1 - math.exp(-strength)) / strength if strength else 1.0


def test_strengths_are_the_pull_times_the_root_of_the_energy_over_its_mean() -> None:
    energies = np.array([4.0, 1.0, 0.25, 0.0], np.float32)
    found = pull_strengths(0.3, energies, 7)
    assert found.dtype == np.float32
    assert found == pytest.approx(strengths(0.3, energies.tolist(), 7), rel=1e-6)
    stacked = pull_strengths(0.3, np.stack([energies, 10 * energies, 0 * energies]), 7)
    assert stacked[:2] == pytest.approx(np.stack([found, found]), rel=1e-6)  # the scale of the inputs says nothing
    assert (stacked[2] == 0).all()
    assert pulled_share(found) == pytest.approx([1 - left(s) for s in found.tolist()], rel=1e-6)


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
    constrain(optimizer, model, tmp_path / "s.safetensors", steps=1)
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
            constrain(optimizer, model, tmp_path / f"{number}.safetensors", steps=1)
        for seed in range(3):
            step(model, optimizer, seed)
        ends.append(copies(dict(model.named_parameters())))
    plain, padded, without, free = ends
    close(padded, plain, 1e-6)
    assert all(torch.equal(without[name], free[name]) for name in free)
    assert float((plain["one"] - free["one"]).norm()) > 0.1


# Courses


@pytest.mark.parametrize("pull", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("line", [False, True])
def test_what_is_left_of_a_constant_update_does_not_depend_on_the_length_of_the_course(
    pull: float, line: bool, tmp_path: Path
) -> None:
    shares = []
    for steps in (48, 480, 4800):
        model = three_weights()
        write(tmp_path / "s.safetensors", held(model), rank=10, pull=pull, energies=torch.ones)
        start = copies(held(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=1 / steps)
        paces = [1 - step / steps if line else 1.0 for step in range(steps)]
        constrain(optimizer, model, tmp_path / "s.safetensors", steps=sum(paces))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for pace in paces:
            optimizer.param_groups[0]["lr"] = pace / steps
            optimizer.step()
        moved = {name: float((weight.detach() - start[name]).mean()) for name, weight in held(model).items()}
        shares.append(moved["one"] / -(sum(paces) / steps))
        assert moved["other"] == pytest.approx(moved["one"], rel=1e-4)
    assert shares == pytest.approx([left(pull)] * 3, rel=0.02)
    assert shares[1:] == pytest.approx([left(pull)] * 2, rel=0.006)


def test_a_pull_and_its_course_grow_together(tmp_path: Path) -> None:
    ends = []
    for pull, steps in ((0.3, 1), (3, 10), (30, 100.0)):
        model = three_weights()
        write(tmp_path / "s.safetensors", held(model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        constrain(optimizer, model, tmp_path / "s.safetensors", pull=pull, steps=steps)
        step(model, optimizer, 1)
        ends.append(copies(dict(model.named_parameters())))
    close(ends[1], ends[0], 1e-6)
    close(ends[2], ends[0], 1e-6)


def test_a_soft_subspace_asks_for_the_length_of_the_course_and_nothing_else_does(tmp_path: Path) -> None:
    model = three_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    write(tmp_path / "soft.safetensors", held(model))
    write(tmp_path / "hard.safetensors", held(model), pull=None)
    for options in ({}, {"pull": 3}):
        with pytest.raises(OptionError, match=r"soft\.safetensors: .*steps at the peak rate.*steps=") as no:
            constrain(optimizer, model, tmp_path / "soft.safetensors", **options)
        assert "\n" not in str(no.value)
    for steps in (0, -1, math.nan, math.inf, True, "48"):
        with pytest.raises(OptionError, match="steps must be a number above 0"):
            constrain(optimizer, model, tmp_path / "soft.safetensors", steps=steps)  # type: ignore[arg-type]
    constrain(optimizer, model, tmp_path / "hard.safetensors").remove()
    constrain(optimizer, model, tmp_path / "hard.safetensors", steps=48).remove()
    assert not optimizer._optimizer_step_pre_hooks
