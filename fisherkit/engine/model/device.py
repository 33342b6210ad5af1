"""Choice of the device."""

import torch

from fisherkit.errors import OptionError, first_line


def choose_device(wanted: str) -> torch.device:
    """Return the device for ``--device``; ``auto`` is CUDA when there is one, else the CPU.

    Raises:
        OptionError: the device is not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {wanted}: not available here ({first_line(error)})") from error
    return device
