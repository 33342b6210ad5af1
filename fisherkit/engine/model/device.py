"""Choice of the device."""

import torch

from fisherkit.errors import OptionError, first_line
from fisherkit.kernels.devices import has_float64


def choose_device(wanted: str, *, float64: bool = False) -> torch.device:
    """Return the device for ``--device``, with its number; ``auto`` is CUDA when there is one, else the CPU.

    Args:
        wanted: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``, ``mps``.
        float64: whether what is to be computed there needs 64-bit floats.

    Raises:
        OptionError: the device is not there, or lacks what is needed.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        others = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}, " if torch.cuda.is_available() else ""
        raise OptionError(
            f"--device {wanted}: not available here ({_reason(error)}); use {others}cpu, or auto"
        ) from error
    if device.type == "meta":
        raise OptionError(f"--device {wanted}: not available here (it holds no values); use cpu, or auto")
    if float64 and not has_float64(device):
        raise OptionError(f"--device {wanted}: has no 64-bit floats, in which directions are found; use --device cpu")
    return device


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Check by a small product that a device computes in a dtype.

    Raises:
        OptionError: it does not.
    """
    try:
        ones = torch.ones(2, 2, dtype=dtype, device=device)
        (ones @ ones).float().sum().cpu()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, NotImplementedError) as error:
        name = str(dtype).removeprefix("torch.")
        other = "float32" if dtype != torch.float32 else "bfloat16"
        raise OptionError(
            f"--dtype {name}: {device} does not compute in it ({_reason(error)}); use --dtype {other}, or --device cpu"
        ) from error


def _reason(error: Exception) -> str:
    """Return torch's first sentence: what follows may be a page."""
    return first_line(error).split(". ")[0][:120]
