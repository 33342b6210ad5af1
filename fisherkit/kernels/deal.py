"""Samples or files dealt out to several processes."""

import heapq
from collections.abc import Sequence


def deal(lengths: Sequence[int], of: int) -> list[list[int]]:
    """Deal things out to ``of`` parts of about the same size; the same sizes give the same parts everywhere.

    The largest that is left goes to the part with the least, of equal ones to the first: at the end no part has more
    than another by more than its last one.

    Args:
        lengths: size of each: tokens of samples, bytes of files.
        of: number of parts.

    Returns:
        For each part the indices of its own, ascending; empty where there are more parts than things.
    """
    parts: list[list[int]] = [[] for _ in range(of)]
    loads = [(0, number) for number in range(of)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, number = loads[0]
        parts[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return [sorted(part) for part in parts]
