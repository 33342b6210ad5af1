"""Sums over all ranks, each tensor's in the memory of its owner: a reduce-scatter in which the owners are chosen.

Every rank sends each owner what is the owner's, and no more: of B bytes that are well spread, (n - 1)/n B, as much as a
ring's reduce-scatter sends. The owner adds what comes in an order that only the number of ranks decides, so that the
same number gives the same bits.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 1 << 22
"""Entries that are sent at a time; so many are received into memory of their own."""


def reduce_to_owners_(
    tensors: Sequence[Tensor],
    owners: Sequence[int],
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    *,
    through_host: bool = False,
) -> int:
    """Add each tensor up over all ranks, in its owner's memory; return the bytes that this rank sent.

    Args:
        tensors: contiguous, of one dtype and device, the same shapes in the same order in every rank.
        owners: the rank that owns each of them.
        rank: of this process in the group.
        size: of the group.
        group: of all processes, of a backend for the tensors' device.
        through_host: the backend is gloo, which sends and receives in the host's memory alone.
    """
    sent = 0
    mine = [tensor for tensor, owner in zip(tensors, owners, strict=True) if owner == rank]
    largest = min(PIECE, max((tensor.numel() for tensor in mine), default=0))
    arriving = mine[0].new_empty(largest, device="cpu" if through_host else None) if mine else torch.empty(0)
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        theirs = [tensor for tensor, owner in zip(tensors, owners, strict=True) if owner == to]
        for leaving, place in zip_longest(_pieces(theirs), _pieces(mine)):
            operations = []
            if leaving is not None:
                operations.append(dist.P2POp(dist.isend, leaving.cpu() if through_host else leaving, to, group))
                sent += leaving.nbytes
            if place is not None:
                received = arriving[: place.numel()]
                operations.append(dist.P2POp(dist.irecv, received, source, group))
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            if place is not None:
                place.add_(received.to(place.device))
    return sent


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from torch.split(tensor.view(-1), PIECE)
