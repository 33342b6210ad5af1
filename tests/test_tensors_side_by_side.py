"""Tensors side by side: the same results in the same order, and torch's threads as they were."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fisherkit.kernels.side_by_side import side_by_side


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_come_in_the_order_of_the_items(threads: int, count: int) -> None:
    items = [torch.full((size,), float(size)) for size in range(count)]
    found = side_by_side(lambda item: float(item.sum()), items, [item.numel() for item in items])
    assert found == [float(size * size) for size in range(count)]


def test_torch_computes_alone_inside_and_as_before_outside(threads: int) -> None:
    inside = side_by_side(lambda item: torch.get_num_threads(), [1, 2, 3], [1, 1, 1])
    assert inside == [1, 1, 1]
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == threads


def test_the_first_error_in_the_order_of_the_items_is_raised(threads: int) -> None:
    def fail(item: int) -> None:
        if item:
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        side_by_side(fail, [0, 1, 2, 3], [1, 1, 9, 5])
    assert torch.get_num_threads() == threads


def test_all_threads_have_ended_when_the_caller_s_own_error_gets_out(threads: int) -> None:
    under_way, counts = set[int](), list[int]()

    def work(item: int) -> int:
        under_way.add(item)
        time.sleep(0.02)
        under_way.discard(item)
        return item

    def done(count: int) -> None:
        counts.append(count)
        if count == 2:
            raise KeyError("the caller's")

    with pytest.raises(KeyError, match="caller"):
        side_by_side(work, list(range(9)), [1] * 9, done)
    assert counts == [1, 2]
    assert not under_way
    assert torch.get_num_threads() == threads
