"""Figures of tokens against float64, and intervals against their definitions and simulations."""

import math

import numpy as np
import pytest
import torch

from fisherkit.kernels.intervals import ratio_difference, ratio_mean, share, student
from fisherkit.kernels.token_scores import divergence, token_losses

# Tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_hits_are_those_of_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = (torch.randn(50, 300) * 5).to(dtype), torch.randint(300, (50,))
    losses, hits = token_losses(logits, labels)
    wanted = -logits.double().log_softmax(-1)[torch.arange(50), labels]
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-6)
    assert hits.tolist() == [int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True)]


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    losses, hits = token_losses(torch.zeros(2, 4), torch.tensor([0, 1]))
    assert hits.tolist() == [True, False]
    assert losses.tolist() == pytest.approx([math.log(4)] * 2)


def test_divergence_is_that_of_float64() -> None:
    torch.manual_seed(0)
    first, other = torch.randn(40, 500) * 3, torch.randn(40, 500) * 3
    found, agreed = divergence(first.clone(), other.clone())
    p, q = first.double().log_softmax(-1), other.double().log_softmax(-1)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), atol=1e-6, rtol=1e-6)
    assert agreed.tolist() == (first.argmax(-1) == other.argmax(-1)).tolist()


def test_divergence_of_a_distribution_from_itself_is_zero_and_never_below() -> None:
    logits = torch.randn(20, 100) * 10
    assert divergence(logits, logits.clone())[0].tolist() == [0.0] * 20
    assert (divergence(logits, logits + 1e-6 * torch.randn_like(logits))[0] >= 0).all()


def test_tokens_that_are_ruled_out_add_nothing_or_everything() -> None:
    first, other = torch.zeros(3, 3), torch.zeros(3, 3)
    first[0, 2] = other[0, 2] = -math.inf  # by both
    first[1, 2] = -math.inf  # by the first
    other[2, 2] = -math.inf  # by the other alone
    found = divergence(first, other)[0]
    assert found[0] == 0
    assert found[1] == pytest.approx(math.log(3 / 2))
    assert found[2] == math.inf


def test_vocabularies_of_two_sizes_are_compared_on_what_both_have() -> None:
    torch.manual_seed(0)
    first, other = torch.randn(5, 30), torch.randn(5, 20)
    for found, wanted in zip(divergence(first, other), divergence(first[:, :20], other), strict=True):
        assert torch.equal(found, wanted)


def test_a_nan_stays_one() -> None:
    assert token_losses(torch.full((1, 3), math.nan), torch.tensor([0]))[0].isnan().all()


# Intervals


@pytest.mark.parametrize(
    ("degrees", "wanted"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (199, 1.97196)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, wanted: float) -> None:
    assert student(degrees) == pytest.approx(wanted, abs=5e-6 * wanted)


def test_quantiles_fall_to_those_of_the_normal_distribution() -> None:
    values = [student(degrees) for degrees in range(1, 700)]
    assert values == sorted(values, reverse=True)
    assert student(10**9) == pytest.approx(1.959964, abs=1e-6)


def test_with_equal_sizes_it_is_the_usual_interval_of_a_mean() -> None:
    totals = np.random.default_rng(0).normal(size=20)
    mean, half = ratio_mean(totals, np.ones(20))
    assert mean == pytest.approx(totals.mean())
    assert half == pytest.approx(student(19) * totals.std(ddof=1) / math.sqrt(20))
    assert ratio_mean(7 * totals, np.full(20, 7.0)) == pytest.approx((mean, half))


def test_one_sample_has_no_interval() -> None:
    assert ratio_mean([3.0], [2.0]) == (1.5, None)
    assert share([True]) == (1.0, None)


def test_a_pair_that_differs_by_the_same_everywhere_has_an_interval_of_nothing() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 30, 50).astype(float)
    totals = generator.normal(size=50) * sizes
    difference, half = ratio_difference(totals + 0.25 * sizes, sizes, totals, sizes)
    assert difference == pytest.approx(0.25)
    assert half == pytest.approx(0, abs=1e-12)


def test_a_pair_of_one_size_is_the_interval_of_the_differences() -> None:
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 30, 50).astype(float)
    one, other = generator.normal(size=(2, 50)) * sizes
    assert ratio_difference(one, sizes, other, sizes) == pytest.approx(ratio_mean(one - other, sizes))


def test_intervals_hold_the_truth_19_times_out_of_20() -> None:
    """Samples of different lengths, whose tokens go together."""
    generator = np.random.default_rng(0)
    held, draws = 0, 2000
    for _ in range(draws):
        sizes = generator.integers(1, 40, 25).astype(float)
        totals = sizes * (2 + generator.normal(size=25)) + generator.normal(size=25) * np.sqrt(sizes)
        mean, half = ratio_mean(totals, sizes)
        assert half is not None
        held += abs(mean - 2) <= half
    assert 0.92 < held / draws < 0.97
