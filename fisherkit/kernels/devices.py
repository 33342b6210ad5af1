"""What some devices cannot do, asked by the kernels that have another way."""

import torch

_WITHOUT_FLOAT64 = ("mps",)


def has_float64(device: torch.device) -> bool:
    """Return False for devices without 64-bit floats (Apple's GPUs): what needs them is computed on the CPU."""
    return device.type not in _WITHOUT_FLOAT64


def wide_device(device: torch.device) -> torch.device:
    """Return the device for float64 work on tensors of ``device``: itself, or the CPU where it has no float64."""
    return device if has_float64(device) else torch.device("cpu")
