"""Whole tensors side by side, a thread to each.

What is done with a finished tensor (figures, rounding, writing) is mostly for one thread, whatever torch is given; and
where it is not, threads that share every small step wait for each other.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int]) -> Iterator[Result]:
    """Yield ``work(item)`` of each item, in their order; as many are under way as torch has threads.

    Args:
        work: called by threads in which torch computes alone.
        items: what it is called with.
        sizes: of the items; the largest are begun first, so that all threads end at about the same time.

    Raises:
        Exception: what ``work`` raises, of the first item in their order that it raises for.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads, "side-by-side", torch.set_num_threads, (1,))
    try:
        begun = {at: pool.submit(work, items[at]) for at in sorted(range(len(items)), key=lambda at: -sizes[at])}
        for at in range(len(items)):
            yield begun.pop(at).result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # or threads that begin from now on would compute alone, too
