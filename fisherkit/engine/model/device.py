"""Choice of the device."""

import torch

from fisherkit.errors import OptionError, first_line


def choose_device(wanted: str) -> torch.device:
    """Return the device for ``--device``; ``auto`` is CUDA when there is one, else the CPU.

    Raises:
        OptionError: the device is not there, or of a kind that is not supported.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type not in ("cpu", "cuda"):
        # Apple's GPUs have no float64, in which sums are taken, and neither kind tells how much memory is free.
        raise OptionError(f"--device {wanted}: not supported; use cpu, or cuda (NVIDIA, and AMD with ROCm's torch)")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {wanted}: not available here ({first_line(error)})") from error
    return device
