"""Where the processes of a run are: on which machine, and on which of its devices."""

import os
import socket
from dataclasses import dataclass

import torch

from fisherkit.errors import OptionError, counted


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        host: name of its machine, for people.
        machine: the same for processes that can look at each other's files in /proc; a container is a machine.
        pid: its number there.
    """

    host: str
    machine: str
    pid: int

    @classmethod
    def here(cls) -> "Place":
        """Return the place of this process."""
        try:
            space = os.readlink("/proc/self/ns/pid")
        except OSError:  # not Linux
            space = ""
        host = socket.gethostname()
        return cls(host, f"{host} {space}", os.getpid())


def local_device(chosen: torch.device, number: int, neighbours: int) -> torch.device:
    """Return the device of one of several processes of a machine.

    A scheduler may show each process one GPU of its own; all of them call it number 0.

    Args:
        chosen: what ``--device`` says.
        number: of the process among those of its machine.
        neighbours: how many these are.

    Raises:
        OptionError: there are more processes than GPUs, or all of them are told to take the same.
    """
    if chosen.type != "cuda":
        return chosen
    count = torch.cuda.device_count()
    if count == 1 and neighbours > 1 and os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") == 0:
        number = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") else number
    if number >= count:
        raise OptionError(
            f"--device {chosen}: {counted(neighbours, 'process')[:-1]}es on this machine, but {counted(count, 'GPU')}; "
            f"use --nproc-per-node {count}, or --device cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device
