"""Run by test_training_sharded in a process of its own: two gloo processes train what FSDP2 spread over them.

Each mask holds on the gathered weights, and the run ends as the same run in one process does.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import batch, check_frozen, copies, llama, masks, matrices, subspaces

from fisherkit.training import MIGU, constrain

WORLD = 2
Attach = Callable[[torch.optim.Optimizer, nn.Module], Any]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def train(attach: Attach, *, sharded: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after three steps, gathered."""
    model = llama()
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 47)  # rows that two processes cannot share evenly
    model.model.layers[0].mlp.gate_proj = nn.Linear(32, 47)
    model.model.layers[0].mlp.down_proj = nn.Linear(47, 32)
    for number, parameter in enumerate(model.parameters()):
        if number in range(7, 13):
            nn.init.normal_(parameter, 0.0, 0.1, generator=torch.Generator().manual_seed(number))
    if sharded:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    before = copies({name: whole(p.detach()) for name, p in matrices(model).items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    attach(optimizer, model)
    for step in range(3):
        model(**batch(step)).loss.backward()  # the same rows in both, so that their mean is one process's gradient
        optimizer.step()
        optimizer.zero_grad()
    return before, {name: whole(p.detach()) for name, p in matrices(model).items()}


def both_ways(attach: Attach) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    _, alone = train(attach, sharded=False)
    before, together = train(attach, sharded=True)
    for name, weight in together.items():
        assert torch.allclose(weight, alone[name], atol=2e-3), (name, float((weight - alone[name]).abs().max()))
    return before, together


def run(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    before, _ = train(lambda optimizer, model: None, sharded=False)
    for kind in ("rows", "columns", "elements"):
        flags = masks(before, kind)
        check_frozen(*both_ways(lambda optimizer, model, mask=flags: constrain(optimizer, model, mask)), flags)
    parts = subspaces(before)
    start, end = both_ways(lambda optimizer, model: constrain(optimizer, model, parts))
    for name in start:
        change = end[name].double() - start[name].double()
        assert float((parts[f"{name}.U"].double().mT @ change).norm() / change.norm()) < 2e-6, name
        assert float((change @ parts[f"{name}.V"].double()).norm() / change.norm()) < 2e-6, name
    start, end = both_ways(lambda optimizer, model: constrain(optimizer, model, [1.0, 1.0, 1e8], floor=0.0, power=1))
    for name in start:
        moved = float((end[name] - start[name]).norm())
        assert moved < 1e-5 if ".layers.2." in name else moved > 1e-2
    both_ways(lambda optimizer, model: MIGU(0.7, parity=None).attach(optimizer, model))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked: what this process has imported is there at once, and it has run nothing that forking would break.
    torch.multiprocessing.start_processes(run, (sys.argv[1],), nprocs=WORLD, start_method="fork")
    sys.stdout.write("all held\n")
