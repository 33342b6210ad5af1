"""Kernels against the formula in float64, at the edges of their tiles and of their ranges."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fisherkit.kernels import fisher as kernels
from fisherkit.kernels.loss import sample_labels, sample_loss


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
    return sum(((g.double().T @ x.double()) ** 2 for x, g in zip(inputs, grads, strict=True)), torch.zeros(1))


@pytest.mark.parametrize("tile", [(1024, 2048), (4, 3), (1, 1), (7, 100)])
@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (8, 6), (13, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_per_sample_whatever_the_tiles(
    tile: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = [random(t, shape[1], seed=t, dtype=dtype) for t in (5, 1, 12)]
    grads = [random(t, shape[0], seed=50 + t, dtype=dtype) for t in (5, 1, 12)]
    found = torch.full(shape, 2.0)
    kernels.add_squared_tiles_(found, inputs, grads, tile=tile, square_rows=2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), 2.0 + oracle(inputs, grads), rtol=tolerance, atol=tolerance)


def test_float32_sums_do_not_stall_where_bfloat16_would() -> None:
    found = torch.zeros(1, 1)
    one = [torch.ones(1, 1, dtype=torch.bfloat16)] * 1000
    kernels.add_squared_linear_grads_(found, one, one)
    assert found.item() == 1000


def test_slices_of_a_padded_batch_are_taken_as_they_are() -> None:
    x, g = random(3, 6, 5), random(3, 6, 4, seed=1)
    lengths = [6, 2, 1]
    inputs = [x[n, :length] for n, length in enumerate(lengths)]
    grads = [g[n, :length] for n, length in enumerate(lengths)]
    found = torch.zeros(4, 5)
    kernels.add_squared_linear_grads_(found, inputs, grads)
    torch.testing.assert_close(found.double(), oracle(inputs, grads), rtol=1e-5, atol=1e-6)


def test_bias_is_the_sum_over_tokens_squared() -> None:
    grads = [random(t, 5, seed=t) for t in (3, 1)]
    found = torch.ones(5)
    kernels.add_squared_bias_grads_(found, grads)
    expected = 1 + sum(g.double().sum(0) ** 2 for g in grads)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (3, 4, 5)])
def test_squares_of_any_shape_and_block(shape: tuple[int, ...]) -> None:
    grad = random(*shape, dtype=torch.bfloat16)
    found = torch.ones(shape)
    kernels.add_squares_(found, grad, block_entries=7)
    torch.testing.assert_close(found, 1 + grad.float() ** 2)


def test_squares_of_a_gradient_that_is_not_contiguous() -> None:
    grad = random(4, 6).T
    found = torch.zeros(6, 4)
    kernels.add_squares_(found, grad)
    torch.testing.assert_close(found, grad**2)


# Losses


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_over_counted_tokens_predicted_by_the_logits_before_them(reduction: str) -> None:
    logits, labels = random(6, 11), torch.tensor([3, 1, 4, 1, 5, 9])
    counted = torch.tensor([1, 3, 4])
    each = [-F.log_softmax(logits[t - 1].double(), 0)[labels[t]] for t in (1, 3, 4)]
    expected = sum(each) / (3 if reduction == "mean" else 1)
    assert sample_loss(logits, labels, counted, reduction).item() == pytest.approx(float(expected), rel=1e-6)


def test_loss_is_float32_even_of_bfloat16_logits() -> None:
    logits = random(3, 5, dtype=torch.bfloat16)
    counted = torch.tensor([1, 2])
    assert sample_loss(logits, torch.tensor([0, 1, 2]), counted, "mean").dtype == torch.float32


def test_sampled_labels_follow_the_models_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = probabilities.log().repeat(20_001, 1)
    drawn = sample_labels(logits, torch.zeros(20_001, dtype=torch.int64), seed=1)
    shares = torch.bincount(drawn[1:], minlength=4) / 20_000
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.012)


def test_sampled_labels_keep_the_first_token_and_certain_ones() -> None:
    logits = torch.full((4, 7), -1e4)
    logits[torch.arange(4), torch.tensor([6, 0, 3, 2])] = 1e4
    drawn = sample_labels(logits, torch.tensor([5, 5, 5, 5]), seed=0)
    assert drawn.tolist() == [5, 6, 0, 3]
