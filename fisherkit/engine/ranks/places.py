"""Where the processes of a run are: on which machine, and on which of its devices."""

import os
import socket
from dataclasses import dataclass

import torch


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


def take_local_gpu(wanted: str) -> None:
    """Make the GPU of this process the current one, before anything is put on the first.

    Args:
        wanted: what ``--device`` says; a GPU that it names by number is left as it is.
    """
    number = os.environ.get("LOCAL_RANK", "")
    if wanted not in ("auto", "cuda") or not number.isdecimal():
        return
    if not torch.cuda.is_available():
        return
    if not torch.cuda.is_initialized() or torch.cuda.current_device() == 0:  # type: ignore[no-untyped-call]  # else chosen
        torch.cuda.set_device(int(number) % torch.cuda.device_count())


def local_device(chosen: torch.device, number: int) -> torch.device:
    """Return the device of one of several processes of a machine, and make it the current one.

    Where there are more processes than GPUs, or a scheduler shows each of them one GPU of its own, numbers start over.

    Args:
        chosen: of choose_device, after take_local_gpu.
        number: of the process among those of its machine; asked only where no launcher says it.
    """
    if chosen.type != "cuda":
        return chosen
    if not os.environ.get("LOCAL_RANK"):
        chosen = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(chosen)
    return chosen


def name_of_gpu(device: torch.device) -> str | None:
    """Return what only one GPU in the world is called; None for other devices."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
