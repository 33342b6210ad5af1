"""Memory that is free: on the device, and on the host within its cgroup and its ulimit."""

import ctypes
import sys
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can still be taken: on the device, or on the host within its cgroup and its ulimit."""
    if device.type in ("cuda", "xpu"):
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    host = min(_machine(), _cgroup(), _ulimit())
    if device.type == "mps":  # its memory is the host's, of which it may take a part
        return min(host, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return host


def used_bytes(device: torch.device) -> int:
    """Return the bytes that this process holds: tensors on the device, or what is its own of the host's memory.

    Pages of files that are mapped, such as weights, are not its own: the system takes them back when it likes.
    """
    if device.type in ("cuda", "xpu"):
        held: int = torch.get_device_module(device).memory_allocated(device)
        return held
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:  # not Linux
        return _peak()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def _peak() -> int:
    """Return the most bytes that this process held so far; 0 where nothing tells."""
    try:
        import resource
    except ImportError:  # not Unix
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Its heap keeps what was freed between pieces still in use; over many groups of blocks that adds up.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 << 30  # not Linux: a guess that any machine meets


def _cgroup() -> int:
    """Return the bytes left in this process's memory cgroup (v2, or v1); file pages count as free."""
    limits = [1 << 62]
    for folder in _cgroup_folders():
        try:
            limit = next(
                (folder / name).read_text()
                for name in ("memory.max", "memory.limit_in_bytes")
                if (folder / name).is_file()
            )
            used = next(
                (folder / name).read_text()
                for name in ("memory.current", "memory.usage_in_bytes")
                if (folder / name).is_file()
            )
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, StopIteration, ValueError):
            continue
        if limit.strip() != "max":
            files = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
            limits.append(max(0, int(limit) - int(used) + files))
    return min(limits)


def _cgroup_folders() -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text("ascii").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUP / controllers if controllers else CGROUP
            own = root / path.lstrip("/")
            folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return folders


def _ulimit() -> int:
    """Return the bytes left under RLIMIT_AS (``ulimit -v``)."""
    try:
        import resource
    except ImportError:  # not Unix
        return 1 << 62
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return 1 << 62
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:
        return limit
    return max(0, limit - pages * resource.getpagesize())
