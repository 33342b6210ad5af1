"""Choice of the dtype that is computed in: the checkpoint's own, unless this CPU multiplies it far more slowly.

Many CPUs have no 16-bit matrix product for the shapes of a backward pass. With AVX2 alone, torch multiplies bfloat16
some 70 times more slowly than float32, and a run would seem to hang.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

ROWS, CHANNELS = 64, 512  # about a second where a product runs at 0.3 GFLOP/s, a few milliseconds elsewhere
REPEATS = 5
FACTOR = 2.0
"""Float32 takes twice the memory, and timing is noisy: it must be this many times faster to be chosen."""


def choose_compute_dtype(stored: torch.dtype, device: torch.device) -> tuple[torch.dtype, str | None]:
    """Return the dtype to compute in, and a line that says why if it is not ``stored``.

    Args:
        stored: dtype of the checkpoint.
        device: to compute on; only a CPU is probed.
    """
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored, None
    slower = slowdown(stored)
    if slower < FACTOR:
        return stored, None
    name = str(stored).removeprefix("torch.")
    return torch.float32, f"computing in float32: this CPU multiplies {name} {slower:.0f} times more slowly"


@lru_cache
def slowdown(dtype: torch.dtype) -> float:
    """Return the time of a linear layer's three products in ``dtype``, as a multiple of that in float32.

    They are the forward, the gradient of the input and the gradient of the weight. One thread computes them, so that
    its CPU time is the whole of it; waiting threads would count as well.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return sum(map(_seconds, _products(dtype))) / sum(map(_seconds, _products(torch.float32)))
    finally:
        torch.set_num_threads(threads)


def _products(dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    x, g = torch.ones(ROWS, CHANNELS, dtype=dtype), torch.ones(ROWS, CHANNELS, dtype=dtype)
    weight = torch.ones(CHANNELS, CHANNELS, dtype=dtype)
    return [lambda: x @ weight.mT, lambda: g @ weight, lambda: g.mT @ x]


def _seconds(product: Callable[[], Tensor]) -> float:
    """Return the best CPU time of several: wall time counts what other programs take on a busy machine."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        product()
        times.append(time.thread_time() - start)
    return min(times)
