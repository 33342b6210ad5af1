"""Singular modes against a float64 decomposition, on spectra of all kinds and at the ends of ranges."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fisherkit.errors import CheckpointError, OptionError
from fisherkit.kernels import range_finder, subspace
from fisherkit.kernels.range_finder import RowBlocks
from fisherkit.kernels.subspace import (
    Modes,
    effective_rank,
    energy_held,
    modes_for_energy,
    top_modes,
)

RANK = 12
SIZE = 400  # smaller side: above what is decomposed exactly at this rank

AT = torch.arange(SIZE, dtype=torch.float64)
TOP = AT < RANK
SPECTRA = {
    "exponential": 0.9**AT,
    "slow exponential": 0.98**AT,
    "flat, gap": torch.where(TOP, 1.0, 0.5),
    "flat, narrow gap": torch.where(TOP, 1.0, 0.9),
    "power law": 1 / (AT + 1),
    "line, gap": torch.where(TOP, 1.0, 0.7) * (1.2 - AT / SIZE),
    "near rank 1": torch.where(AT == 0, 1.0, 0.01 * torch.where(TOP, 1.0, 0.7)),
    "very near rank 1": torch.where(AT == 0, 1.0, 3e-4 * torch.where(TOP, 1.0, 0.7)),
    "low rank": torch.where(TOP, 2.0 - AT / RANK, 0.0),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(s: Tensor, height: int, width: int) -> Tensor:
    u, v = (torch.linalg.qr(random(size, len(s), seed=size)).Q for size in (height, width))
    return ((u * s) @ v.T).float()


def largest_angle(found: Tensor, expected: Tensor) -> float:
    """Sine of the largest principal angle between two spaces given by orthonormal columns."""
    a, b = found.double(), expected.double()
    assert a.shape == b.shape
    return float(torch.linalg.matrix_norm(b - a @ (a.T @ b), 2))


def assert_orthonormal(modes: Modes) -> None:
    for columns in (modes.u, modes.v):
        torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1]), rtol=0, atol=1e-5)


def assert_modes_of(modes: Modes, matrix: Tensor, rank: int) -> None:
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert_orthonormal(modes)
    assert largest_angle(modes.u, u[:, :rank]) < 1e-2
    assert largest_angle(modes.v, vt[:rank].T) < 1e-2
    torch.testing.assert_close(modes.s.double(), s[:rank], rtol=1e-4, atol=1e-6 * float(s[0]))
    rebuilt = (modes.u * modes.s).double() @ modes.v.T.double()
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert float((rebuilt - best).norm()) < 1e-2 * float(s.norm())  # u and v belong to each other, signs included


@pytest.mark.parametrize("shape", [(500, SIZE), (SIZE, 600), (SIZE, SIZE)])
@pytest.mark.parametrize("name", SPECTRA)
def test_modes_are_those_of_a_full_decomposition_wherever_there_is_a_gap(name: str, shape: tuple[int, int]) -> None:
    matrix = with_spectrum(SPECTRA[name], *shape)
    assert_modes_of(top_modes(matrix, RANK), matrix, RANK)


@pytest.mark.parametrize("rank", [1, 5, 30, 31, 1000])
@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (30, 30)])
def test_small_matrices_are_decomposed_exactly(shape: tuple[int, int], rank: int) -> None:
    matrix = random(*shape).float()
    modes = top_modes(matrix, rank)
    assert len(modes.s) == min(rank, 30)
    assert_modes_of(modes, matrix, min(rank, 30))
    assert modes.frobenius == pytest.approx(float(matrix.double().norm()), rel=1e-12)


def test_a_fisher_like_matrix_in_bfloat16() -> None:
    scores = random(500, 1).square() @ random(1, 400, seed=1).square() * random(500, 400, seed=2).square() * 1e-12
    matrix = scores.bfloat16()
    modes = top_modes(matrix, 1)
    assert_modes_of(modes, matrix, 1)
    assert bool((modes.u > -1e-6).all())  # Perron and Frobenius: the first mode of a Fisher has one sign
    assert bool((modes.v > -1e-6).all())


@pytest.mark.parametrize("entries", [1, 1000, 1 << 20])
def test_blocks_of_rows_equal_the_whole(entries: int) -> None:
    matrix = with_spectrum(SPECTRA["exponential"], 500, SIZE).bfloat16()
    whole = top_modes(matrix, RANK)
    asked: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return matrix[start:stop]

    parts = top_modes(RowBlocks((500, SIZE), rows, entries=entries * 7), RANK)
    step = max(1, entries * 7 // SIZE)
    assert asked[: len(range(0, 500, step))] == [(at, min(at + step, 500)) for at in range(0, 500, step)]
    assert largest_angle(parts.u, whole.u) < 1e-4
    torch.testing.assert_close(parts.s, whole.s, rtol=1e-5, atol=0)


def test_layout_of_the_matrix_does_not_matter() -> None:
    matrix = with_spectrum(SPECTRA["line, gap"], 500, SIZE)
    modes = top_modes(matrix.T.contiguous().T, RANK)
    assert_modes_of(modes, matrix, RANK)


def test_transposing_swaps_the_sides() -> None:
    matrix = with_spectrum(SPECTRA["exponential"], 500, SIZE)
    modes, swapped = top_modes(matrix, RANK), top_modes(matrix.T, RANK)
    assert largest_angle(modes.u, swapped.v) < 1e-4
    torch.testing.assert_close(modes.s, swapped.s, rtol=1e-5, atol=0)


def test_same_seed_same_modes_and_the_seed_hardly_matters() -> None:
    matrix = with_spectrum(SPECTRA["exponential"], 500, SIZE)
    first, again = top_modes(matrix, RANK), top_modes(matrix, RANK)
    other = top_modes(matrix, RANK, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first.u, again.u)
    assert torch.equal(first.v, again.v)
    torch.testing.assert_close(first.u, other.u, rtol=0, atol=1e-4)  # signs included
    assert not torch.equal(first.u, other.u)


@pytest.mark.parametrize("shape", [(500, SIZE), (20, 30)])
def test_the_largest_entry_of_each_left_mode_is_positive(shape: tuple[int, int]) -> None:
    modes = top_modes(random(*shape).float(), 10)
    assert bool((modes.u.gather(0, modes.u.abs().argmax(0, keepdim=True)) > 0).all())
    assert bool((modes.s.diff() <= 0).all())


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1.0, 1e12, 1e35, 5e35])
@pytest.mark.parametrize("shape", [(500, SIZE), (40, 30)])
def test_tiny_and_huge_entries_keep_their_modes(shape: tuple[int, int], scale: float) -> None:
    matrix = (random(shape[0], 2) @ random(2, shape[1], seed=1) * scale).float()
    modes = top_modes(matrix, 2)
    assert_orthonormal(modes)
    expected = torch.linalg.svdvals(matrix.double())[:2]
    torch.testing.assert_close(modes.s.double() / scale, expected / scale, rtol=2e-3 if scale < 1e-40 else 1e-5, atol=0)


@pytest.mark.parametrize("shape", [(500, SIZE), (20, 30), (0, 5), (5, 0), (0, 0)])
def test_zeros_have_no_modes(shape: tuple[int, int]) -> None:
    for modes in (top_modes(torch.zeros(shape), 3), modes_for_energy(torch.zeros(shape), 1.0)):
        assert (modes.u.shape, modes.s.shape, modes.v.shape) == ((shape[0], 0), (0,), (shape[1], 0))
        assert (modes.frobenius, modes.energy, modes.effective_rank) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("place", ["rows", "columns", "spread"])
def test_no_more_modes_than_the_rank(place: str) -> None:
    matrix = torch.zeros(500, SIZE)
    if place == "rows":
        matrix[100:105] = random(5, SIZE).float()
    elif place == "columns":
        matrix[:, 100:105] = random(500, 5).float()
    else:
        matrix = (random(500, 5) @ random(5, SIZE, seed=1)).float()
    modes = top_modes(matrix, 20)
    assert len(modes.s) == 5
    assert_modes_of(modes, matrix, 5)
    assert modes.energy == pytest.approx(1)


def test_ties_give_orthonormal_modes_of_the_right_size() -> None:
    modes = top_modes(torch.eye(SIZE), RANK)
    assert_orthonormal(modes)
    torch.testing.assert_close(modes.s, torch.ones(RANK))
    torch.testing.assert_close(modes.u, modes.v, rtol=0, atol=1e-5)


def test_without_a_gap_the_energy_is_nearly_all_there() -> None:
    matrix = random(500, SIZE).float()
    best = torch.linalg.svdvals(matrix.double())[:RANK].square().sum() / matrix.double().square().sum()
    assert 0.995 * best < top_modes(matrix, RANK).energy <= best + 1e-6


def test_no_iteration_is_a_plain_range_finder() -> None:
    matrix = with_spectrum(SPECTRA["low rank"], 500, SIZE)
    assert_modes_of(top_modes(matrix, RANK, iterations=0, oversample=0), matrix, RANK)


def test_passes_over_the_matrix_end_when_the_modes_stand_still() -> None:
    counted = {}
    for name in ("flat, gap", "line, gap"):
        matrix = with_spectrum(SPECTRA[name], 500, SIZE)
        calls: list[int] = []
        top_modes(RowBlocks((500, SIZE), lambda a, b, m=matrix, c=calls: (c.append(a), m[a:b])[1]), RANK)
        counted[name] = len(calls)
    assert counted["flat, gap"] <= 1 + 2 * 3  # the norm; the start and two iterations
    assert counted["flat, gap"] < counted["line, gap"] <= 1 + 2 * (subspace.ITERATIONS + 1)


@pytest.mark.parametrize("energy", [1e-9, 0.3, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("name", ["exponential", "power law", "near rank 1", "flat, gap", "low rank"])
def test_modes_for_an_energy_are_the_fewest_that_reach_it(name: str, energy: float) -> None:
    matrix = with_spectrum(SPECTRA[name], 500, SIZE)
    shares = torch.linalg.svdvals(matrix.double()).square()
    fewest = int((shares.cumsum(0) / shares.sum() < energy).sum()) + 1
    modes = modes_for_energy(matrix, energy)
    assert len(modes.s) == fewest
    assert modes.energy >= energy
    assert_orthonormal(modes)


@pytest.mark.parametrize("shape", [(500, SIZE), (40, 30), (30, 40), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("rank", [1, 3, None])
def test_all_energy_takes_the_whole_numerical_rank(shape: tuple[int, int], rank: int | None) -> None:
    inner = min(rank or SIZE, *shape)
    matrix = (random(shape[0], inner) @ random(inner, shape[1], seed=1)).float()
    modes = modes_for_energy(matrix, 1.0)
    assert len(modes.s) == (inner if rank else torch.linalg.matrix_rank(matrix.double(), rtol=range_finder.PRECISION))
    assert modes.energy == pytest.approx(1)
    # The last mode may hold less than the rounding of a sum; what matters is that the search ends.
    assert len(modes_for_energy(matrix, 1 - 1e-15).s) in (len(modes.s) - 1, len(modes.s))


def test_effective_rank_counts_equal_modes_and_bounds_the_rest_from_below() -> None:
    assert effective_rank(torch.ones(5), math.sqrt(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0]), 3.0) == pytest.approx(1)
    assert effective_rank(torch.ones(2), math.sqrt(5)) == pytest.approx(5)  # a flat tail is counted as it is
    s = SPECTRA["power law"]
    shares = s.square() / s.square().sum()
    full = math.exp(-float((shares * shares.log()).sum()))
    bounds = [effective_rank(s[:k], float(s.norm())) for k in (1, 5, 50, SIZE)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(full)
    assert effective_rank(torch.tensor([1.0, 0.0]), 1.0) == pytest.approx(1)
    assert effective_rank(torch.zeros(0), 0.0) == 0.0


def test_energy_held_is_a_share() -> None:
    assert energy_held(torch.tensor([3.0, 4.0]), 10.0) == pytest.approx(0.25)
    assert energy_held(torch.tensor([1.0 + 1e-6]), 1.0) == 1.0
    assert energy_held(torch.zeros(0), 2.0) == 0.0


def test_the_first_modes_are_a_copy_of_the_largest() -> None:
    modes = top_modes(random(20, 30).float(), 5)
    first = modes.first(2)
    assert torch.equal(first.u, modes.u[:, :2])
    assert torch.equal(first.v, modes.v[:, :2])
    assert first.energy < modes.energy
    assert first.u.untyped_storage().nbytes() == 20 * 2 * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(500, SIZE), (40, 30)])
def test_values_that_are_not_finite_are_refused_with_their_row(shape: tuple[int, int], value: float) -> None:
    matrix = torch.ones(shape)
    matrix[37, 3] = value
    with pytest.raises(CheckpointError, match=r"^row 37 .*not finite$"):
        top_modes(matrix, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: top_modes(m, 0), "rank .*at least 1.* 0"),
        (lambda m: top_modes(m, 1, iterations=-1), "iterations .*at least 0.* -1"),
        (lambda m: top_modes(m, 1, oversample=-1), "oversample .*at least 0.* -1"),
        (lambda m: modes_for_energy(m, 0.0), "energy .*above 0 and at most 1.* 0.0"),
        (lambda m: modes_for_energy(m, 1.01), "energy .*above 0 and at most 1.* 1.01"),
        (lambda m: modes_for_energy(m, float("nan")), "energy .*above 0 and at most 1.* nan"),
        (lambda m: modes_for_energy(m, 0.5, iterations=-1), "iterations .*at least 0.* -1"),
    ],
)
def test_options_out_of_range_are_refused(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        call(torch.ones(4, 4))
