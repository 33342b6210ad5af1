"""Parameters that are spread over processes (FSDP2's DTensor): the part that lies here, and what belongs to it.

Every process calls these in the same order: laying out a mask may talk to the others.
"""

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return torch.distributed.is_available() and isinstance(tensor, _dtensor().DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part that lies in this process, sharing memory; the tensor itself if it is not spread."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def share_bytes(parameter: Tensor) -> int:
    """Return the bytes that each process holds of a parameter, at an even division: the same number in all of them."""
    if not is_sharded(parameter):
        return parameter.nbytes
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    return -(-parameter.nbytes // int(mesh.size()))


def put(target: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of their shape; DTensors are brought to where the target has its parts first."""
    if is_sharded(target) and is_sharded(values):
        values = values.redistribute(placements=target.placements)  # type: ignore[attr-defined]
    target.copy_(values)


def flags_like(flags: Tensor, parameter: Tensor) -> Tensor:
    """Return the flags of the part of ``parameter`` that lies here, on its device.

    Args:
        flags: bool, the same in every process, broadcastable to the whole parameter.
        parameter: a parameter, spread or not.
    """
    flags = flags.to(parameter.device)
    if not is_sharded(parameter):
        return flags
    dtensor = _dtensor()
    # An axis of size 1 stands for all entries, wherever they lie.
    placements = [
        dtensor.Replicate() if placement.is_shard() and flags.shape[placement.dim] == 1 else placement
        for placement in parameter.placements  # type: ignore[attr-defined]
    ]
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    spread: Tensor = dtensor.distribute_tensor(flags.byte(), mesh, placements).to_local()
    return spread.bool()


def replicated_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor that every process holds whole, on the parameter's device and fit to compute with it."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter):
        return tensor
    dtensor = _dtensor()
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    whole: Tensor = dtensor.DTensor.from_local(tensor, mesh, [dtensor.Replicate()] * mesh.ndim, run_check=False)
    return whole


def _dtensor() -> Any:
    import torch.distributed.tensor as dtensor

    return dtensor
