"""The card and what runs on it: its name, its time, its rate of matrix products."""

import importlib.metadata
import platform
import time
from collections.abc import Callable

import torch


def hardware(device: torch.device) -> dict[str, str]:
    """Return what a reader must know of the machine."""
    found = {"device": str(device)}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found = {
            "GPU": f"{about.name}, {about.total_memory / 1e9:.0f} GB, {about.multi_processor_count} multiprocessors, "
            f"compute capability {about.major}.{about.minor}",
            "CUDA of torch": str(torch.version.cuda),
        }
    versions = {name: _version(name) for name in ("torch", "triton", "transformers")}
    return found | {
        "CPU": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "Python": platform.python_version(),
        **versions,
    }


def seconds(call: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """Return the least time of a call on the device, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def gemm_rate(dtype: torch.dtype, device: torch.device, *, size: int = 8192) -> float:
    """Return FLOP/s of a product of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device)


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that tensors took on the device since ``forget_peak``; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def forget_peak(device: torch.device) -> None:
    """Begin to look for the peak anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
