"""Run by test_ranks in a process of its own: gloo processes that measure together, over a group that is there already.

Arguments: number of processes, a file for their store, and JSON with the calls of ``fisherkit.extract``.
"""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

import fisherkit
from fisherkit.engine.ranks import group, places
from fisherkit.options import ExtractOptions


def run(rank: int, world: int, store: str, calls: list[dict[str, Any]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    if size_apart := os.environ.get("FISHERKIT_TEST_APART"):
        _put_apart(rank, int(size_apart))
    for call in calls:
        options = ExtractOptions(**call["options"])
        report = fisherkit.extract(call["model"], call["prompts"], call["out"], options, distributed=True)
        assert report.path.name
    dist.destroy_process_group()


def _put_apart(rank: int, near: int) -> None:
    """Pretend that ranks from ``near`` on are on machines of their own, which share no file system with the first."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    place = places.Place(
        "here" if rank < near else f"node{rank}", "here" if rank < near else f"node{rank}", os.getpid()
    )
    places.Place.here = classmethod(lambda cls: place)  # type: ignore[method-assign]
    group.sees_folder = lambda folder, ranks: ranks.rank < near  # type: ignore[attr-defined]


if __name__ == "__main__":
    size = int(sys.argv[1])
    # Forked: what this process has imported is there at once, and it has run nothing that forking would break.
    torch.multiprocessing.start_processes(
        run, (size, sys.argv[2], json.loads(sys.argv[3])), nprocs=size, start_method="fork"
    )
