"""Ranks from what a launcher says in the environment, or from a group of torch.distributed that is there already."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fisherkit.engine.ranks import lifeline
from fisherkit.engine.ranks.group import FOREVER, RankGroup
from fisherkit.engine.ranks.places import Place, local_device, name_of_gpu
from fisherkit.engine.ranks.ranks import ALONE, Ranks
from fisherkit.errors import OptionError, first_line

_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def open_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes of this run, inside the ``with``; alone where nothing says that there are others.

    A single process that torchrun has started is a group of one.

    Args:
        device: what is computed on, as this process alone would choose it.

    Raises:
        OptionError: the environment says half of it, or the processes do not find each other.
    """
    if _is_there():
        with _join(device) as ranks:
            yield ranks
    elif _asked_for():
        try:
            dist.init_process_group("gloo", timeout=FOREVER)
        except (ValueError, RuntimeError) as error:
            raise OptionError(f"the ranks do not find each other: {first_line(error)}") from error
        with _join(device) as ranks:
            yield ranks
        dist.destroy_process_group()
    else:
        yield ALONE


def _is_there() -> bool:
    return dist.is_available() and dist.is_initialized() and (dist.get_world_size() > 1 or _by_torchrun())


def _by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _asked_for() -> bool:
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1" and not _by_torchrun():
        return False
    missing = [name for name in _SET_BY_LAUNCHERS if not os.environ.get(name)]
    if missing:
        raise OptionError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} is not set; start with torchrun, which sets all, or "
            "unset WORLD_SIZE"
        )
    if not (dist.is_available() and dist.is_gloo_available()):
        raise OptionError("this torch has no gloo; several processes need it")
    return True


@contextmanager
def _join(device: torch.device) -> Iterator[RankGroup]:
    """Make the run's own groups, store and lifeline over the default group."""
    rank, size = dist.get_rank(), dist.get_world_size()
    control: Any = dist.new_group(backend="gloo", timeout=FOREVER)
    places: list[Any] = [None] * size
    dist.all_gather_object(places, Place.here(), group=control)
    number = [other for other in range(size) if places[other].machine == places[rank].machine].index(rank)
    own = local_device(device, number)
    gpus: list[Any] = [None] * size
    dist.all_gather_object(gpus, (own.type, name_of_gpu(own)), group=control)
    refuse_other_kinds(places, [kind for kind, _ in gpus])
    # NCCL refuses two ranks on one GPU.
    over_nccl = own.type == "cuda" and len(set(gpus)) == size
    data: Any = dist.new_group(backend="nccl", timeout=FOREVER) if over_nccl else control
    store, line = _connect(rank, places, control)
    with RankGroup(
        rank, places, device=own, sharers=gpus.count(gpus[rank]), control=control, data=data, store=store, lifeline=line
    ) as ranks:
        ranks.try_sums()
        yield ranks
        ranks.gather(None)  # nobody hangs up while another still works
    for group in {control, data}:
        dist.destroy_process_group(group)


def refuse_other_kinds(places: list[Place], kinds: list[str]) -> None:
    """Raise OptionError, in all ranks, where they would compute on devices of several kinds."""
    odd = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        raise OptionError(
            f"rank 0 on {places[0].host} computes on {kinds[0]}, rank {odd} on {places[odd].host} on {kinds[odd]}; "
            "give them the same with --device"
        )


def _connect(rank: int, places: list[Place], control: Any) -> tuple[Any, lifeline.Lifeline]:
    """Open a store in rank 0 and connect every rank to it, and to its lifeline, on free ports."""
    connect: Any = vars(dist)["TCPStore"]  # which torch does not declare
    near = len({place.machine for place in places}) == 1
    address = "127.0.0.1" if near else os.environ.get("MASTER_ADDR") or socket.getfqdn()
    opened: list[Any] = [None]
    if rank == 0:
        listening = lifeline.listen(address if near else "")
        store = connect(address, 0, None, is_master=True, wait_for_workers=False)
        opened = [(address, store.port, listening.getsockname()[1], secrets.token_hex(16))]
    dist.broadcast_object_list(opened, 0, group=control)
    address, store_port, port, token = opened[0]
    if rank == 0:
        wires = lifeline.answer(listening, len(places), token)
    else:
        store = connect(address, store_port, None, is_master=False)
        wires = {0: lifeline.call(address, port, rank, token)}
    return store, lifeline.Lifeline(rank, wires, [place.host for place in places])
