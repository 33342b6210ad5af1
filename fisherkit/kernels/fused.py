"""Whether the fused kernel of ``triton_fisher`` is used: on CUDA, where triton is installed, works, and is faster.

It is tried before it is believed: a small product must agree with the plain way, or the plain way is taken.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkit.errors import first_line

Plain = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], None]
_TOLERANCE = 1e-3


def fused_tile(plain: Plain, inputs: Sequence[Tensor], device: torch.device) -> Any:
    """Return the tile with which the fused kernel is the fastest way for these inputs; None where plain torch is.

    Args:
        plain: the plain way.
        inputs: per sample [T_n, I].
        device: of the Fisher.
    """
    if device.type != "cuda" or not works(plain, device):
        return None
    from fisherkit.kernels import triton_fisher

    if inputs[0].dtype not in triton_fisher.DTYPES:
        return None
    try:
        return triton_fisher.fastest(plain, inputs[0].dtype, (max(map(len, inputs)) - 1).bit_length(), device)
    except torch.OutOfMemoryError:  # the comparison takes some 400 MB
        return triton_fisher.TILES[-1]


def add_fused_(fisher: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor], tile: Any) -> None:
    """Add by the fused kernel; arguments are those of ``kernels.fisher.add_squared_linear_grads_``, and the tile."""
    from fisherkit.kernels import triton_fisher

    triton_fisher.add_squared_linear_grads_(fisher, inputs, grads, tile)


@functools.cache
def works(plain: Plain, device: torch.device) -> bool:
    """Return whether triton is there, and the fused kernel agrees with the plain way on a small example."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from fisherkit.kernels.triton_fisher import TILES

        x, g = (torch.linspace(-1, 1, 40 * size, device=device).view(40, size) for size in (70, 130))
        found, wanted = torch.zeros(2, 130, 70, device=device)
        add_fused_(found, [x[:7], x[7:]], [g[:7], g[7:]], TILES[-1])
        plain(wanted, [x[:7], x[7:]], [g[:7], g[7:]])
        differs = float((found - wanted).norm() / wanted.norm())
        trouble = "" if differs < _TOLERANCE else f"it differs from plain torch by {differs:.1e}"
    except Exception as error:  # a compiler, a driver: whatever it is, there is another way
        trouble = f"{type(error).__name__}: {first_line(error)}"
    if trouble:
        warnings.warn(f"the fused kernel is not used: {trouble}", RuntimeWarning, stacklevel=2)
    return not trouble
