"""Run by test_training_sharded in a process of its own: gloo processes train what FSDP2 spread over them.

Each rule holds on the gathered weights, and the run ends as the same run in one process does: all in float64, so that
only a wrong rule tells them apart. Arguments: number of processes, and a folder.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pull_oracle import write
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training_runs import batch, bits, check_frozen, copies, llama, masks, matrices, subspaces

from fisherkit.training import MIGU, constrain

Attach = Callable[[torch.optim.Optimizer, nn.Module], Any]
Ends = tuple[dict[str, Tensor], dict[str, Tensor]]
KINDS = ("rows", "columns", "elements")


def whole(parameter: Tensor) -> Tensor:
    """The weight, which all processes hold alike."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    gathered: Tensor = parameter.full_tensor()
    every = [torch.empty_like(gathered) for _ in range(dist.get_world_size())]
    dist.all_gather(every, gathered)
    assert all(torch.equal(bits(one), bits(gathered)) for one in every)
    return gathered


def build(dtype: torch.dtype) -> Any:
    model = llama()
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 47)  # rows that processes cannot share evenly
    model.model.layers[0].mlp.gate_proj = nn.Linear(32, 47)
    model.model.layers[0].mlp.down_proj = nn.Linear(47, 32)
    for number, parameter in enumerate(model.parameters()):
        if number in range(7, 13):
            nn.init.normal_(parameter, 0.0, 0.1, generator=torch.Generator().manual_seed(number))
    return model.to(dtype)


def spread(model: Any, **policy: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)


def exchange(optimizer: torch.optim.Optimizer, old: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Give an optimizer that was made first what FSDP2 has put in the place of its parameters, as accelerate does."""
    names = {parameter: name for name, parameter in old.items()}
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[names[parameter]] for parameter in group["params"]]


def train(
    attach: Attach,
    *,
    sharded: bool,
    first: str = "shard",
    dtype: torch.dtype = torch.float64,
    policy: MixedPrecisionPolicy | None = None,
    **options: Any,
) -> Ends:
    """Weights before and after three steps, gathered; ``first``: whether the model is spread or held first."""
    model = build(dtype)
    before = copies(matrices(model))
    more = {"mp_policy": policy} if policy is not None else {}
    if sharded and first == "shard":
        spread(model, **more)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
    attach(optimizer, model)
    if sharded and first == "attach":
        old = dict(model.named_parameters())
        spread(model, **more)
        exchange(optimizer, old, model)
    for step in range(3):
        model(**batch(step)).loss.backward()  # the same rows in all, so that their mean is one process's gradient
        optimizer.step()
        optimizer.zero_grad()
    return before, {name: whole(p.detach()) for name, p in matrices(model).items()}


def both_ways(attach: Attach, tolerance: float, **options: Any) -> Ends:
    _, alone = train(attach, sharded=False, **options)
    before, together = train(attach, sharded=True, **options)
    for name, weight in together.items():
        assert torch.allclose(weight, alone[name], rtol=0, atol=tolerance), (
            name,
            float((weight - alone[name]).abs().max()),
        )
    return before, together


def masks_hold(before: dict[str, Tensor]) -> None:
    flags = {kind: masks(before, kind) for kind in KINDS}
    attach = {kind: lambda optimizer, model, kind=kind: constrain(optimizer, model, flags[kind]) for kind in KINDS}
    check_frozen(*both_ways(attach["rows"], 1e-9, foreach=False), flags["rows"])
    check_frozen(*both_ways(attach["columns"], 1e-9, foreach=True), flags["columns"])
    check_frozen(*both_ways(attach["elements"], 1e-9, first="attach"), flags["elements"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    check_frozen(*train(attach["rows"], sharded=True, dtype=torch.float32, policy=policy), flags["rows"])
    check_frozen(*train(attach["elements"], sharded=True, dtype=torch.bfloat16), flags["elements"])


def directions_and_scales_hold(before: dict[str, Tensor], folder: Path) -> None:
    parts = subspaces(before)
    start, end = both_ways(lambda optimizer, model: constrain(optimizer, model, parts), 1e-5)
    for name in start:
        change = end[name] - start[name]
        assert float((parts[f"{name}.U"].double().mT @ change).norm() / change.norm()) < 2e-6, name
        assert float((change @ parts[f"{name}.V"].double()).norm() / change.norm()) < 2e-6, name
    start, end = both_ways(
        lambda optimizer, model: constrain(optimizer, model, [1.0, 1.0, 1e8], floor=0.0, power=1), 1e-5
    )
    for name in start:
        moved = float((end[name] - start[name]).norm())
        assert moved < 1e-5 if ".layers.2." in name else moved > 1e-2
    file = folder / f"soft-{dist.get_rank()}.safetensors"
    write(file, before, sides="VU")
    both_ways(lambda optimizer, model: constrain(optimizer, model, file, steps=1), 1e-5)
    both_ways(lambda optimizer, model: MIGU(0.7, parity=None).attach(optimizer, model), 1e-9)


class Few(nn.Module):
    """Fewer rows than processes, so that some hold nothing of a weight; and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in ((6, 2), (2, 1), (1, 5)))
        self.unused = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def few_rows_hold() -> None:
    for kind in (*KINDS, "subspace"):
        ends = []
        for sharded in (False, True):
            torch.manual_seed(0)
            model = Few().double()
            before = copies({name: p for name, p in model.named_parameters() if p.ndim > 1})
            rules = subspaces(before, rank=1) if kind == "subspace" else masks(before, kind, keep=0.5, seed=2)
            if sharded:
                fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            constrain(optimizer, model, rules)
            for seed in range(2):
                torch.manual_seed(seed)
                model(torch.randn(3, 6).double()).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append({name: whole(dict(model.named_parameters())[name].detach()) for name in before})
        for name, weight in ends[1].items():
            assert torch.allclose(weight, ends[0][name], rtol=0, atol=1e-6), (kind, name)
            if kind != "subspace":
                frozen = ~rules[name].expand(weight.shape)
                assert torch.equal(weight[frozen], before[name][frozen]), (kind, name)


def run(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    before, _ = train(lambda optimizer, model: None, sharded=False)
    masks_hold(before)
    if world > 2:
        directions_and_scales_hold(before, Path(folder))
        few_rows_hold()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked: what this process has imported is there at once, and it has run nothing that forking would break.
    size = int(sys.argv[1])
    torch.multiprocessing.start_processes(run, (size, sys.argv[2]), nprocs=size, start_method="fork")
    sys.stdout.write("all held\n")
