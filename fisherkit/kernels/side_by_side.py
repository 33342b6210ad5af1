"""Whole tensors side by side, a thread to each.

What is done with a finished tensor (figures, rounding, writing) is mostly for one thread, whatever torch is given; and
where it is not, threads that share every small step wait for each other.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST = 16  # more cores than the memory can feed


def side_by_side(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    sizes: Sequence[int],
    done: Callable[[int], object] = lambda count: None,
) -> list[Result]:
    """Return ``work(item)`` of each item, in their order; as many are under way as torch has threads, 16 at most.

    Args:
        work: called by threads in which torch computes alone.
        items: what it is called with.
        sizes: of the items; the largest are begun first, so that all threads end at about the same time.
        done: called here with the number of results so far, each time one is added in the order of the items.

    Raises:
        Exception: what ``work`` raises, of the first item in their order that it raises for; or what ``done`` raises.
    """
    before, results = torch.get_num_threads(), list[Result]()
    threads = min(_MOST, before)
    if threads == 1 or len(items) < 2:
        for item in items:
            results.append(work(item))
            done(len(results))
        return results
    pool = ThreadPoolExecutor(threads, "side-by-side", torch.set_num_threads, (1,))
    try:
        begun = {at: pool.submit(work, items[at]) for at in sorted(range(len(items)), key=lambda at: -sizes[at])}
        for at in range(len(items)):
            results.append(begun.pop(at).result())
            done(len(results))
        return results
    finally:
        try:
            pool.shutdown(cancel_futures=True)  # no thread reads a file that the caller is about to close
        finally:
            torch.set_num_threads(before)  # or threads that begin from now on would compute alone, too
