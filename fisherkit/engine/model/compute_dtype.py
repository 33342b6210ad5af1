"""Choice of the dtype that is computed in: the checkpoint's own, unless this CPU multiplies it far more slowly.

Many CPUs have no 16-bit matrix product for the shapes of a backward pass. With AVX2 alone, torch multiplies bfloat16
some 70 times more slowly than float32, and a run would seem to hang.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

REPEATS = 5
PATIENCE = 0.5  # seconds of CPU after which a product is not repeated: what takes as long is slow for certain
FACTOR = 2.0
"""Float32 takes twice the memory, and timing is noisy: it must be this many times faster to be chosen."""


@dataclass(frozen=True)
class ProbeShape:
    """Shape of the products that a CPU is probed with: x [rows, inputs] through a layer of so many outputs.

    Larger ones are cut down: about two seconds where a product runs at 0.3 GFLOP/s, a few milliseconds elsewhere.
    Smaller ones are made larger: what they take does not matter, and noise would choose another type every time.
    """

    rows: int = 64
    inputs: int = 512
    outputs: int = 512

    def __post_init__(self) -> None:
        for name, least, most in (("rows", 64, 64), ("inputs", 512, 1024), ("outputs", 512, 1024)):
            object.__setattr__(self, name, max(least, min(most, getattr(self, name))))


def shape_to_come(config: Any, tokens: int) -> ProbeShape:
    """Return the shape of a model's products.

    Args:
        config: of transformers; of the text model.
        tokens: that go through a layer together.
    """
    hidden = getattr(config, "hidden_size", None) or 512
    inner = getattr(config, "intermediate_size", None)
    return ProbeShape(tokens, hidden, inner if isinstance(inner, int) and inner > 0 else hidden)


def choose_compute_dtype(
    stored: torch.dtype, device: torch.device, shape: ProbeShape | None = None
) -> tuple[torch.dtype, str | None]:
    """Return the dtype to compute in, and a line that says why if it is not ``stored``.

    Args:
        stored: dtype of the checkpoint.
        device: to compute on; only a CPU is probed.
        shape: of the products to come; None for middling ones.
    """
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored, None
    slower = slowdown(stored, shape or ProbeShape())
    if slower < FACTOR:
        return stored, None
    name = str(stored).removeprefix("torch.")
    return torch.float32, f"computing in float32: this CPU multiplies {name} {slower:.0f} times more slowly"


@lru_cache
def slowdown(dtype: torch.dtype, shape: ProbeShape) -> float:
    """Return the time of a linear layer's three products in ``dtype``, as a multiple of that in float32.

    They are the forward, the gradient of the input and the gradient of the weight. One thread computes them, so that
    its CPU time is the whole of it; waiting threads would count as well.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return sum(map(_seconds, _products(dtype, shape))) / sum(map(_seconds, _products(torch.float32, shape)))
    finally:
        torch.set_num_threads(threads)


def _products(dtype: torch.dtype, shape: ProbeShape) -> list[Callable[[], Tensor]]:
    x, g = torch.ones(shape.rows, shape.inputs, dtype=dtype), torch.ones(shape.rows, shape.outputs, dtype=dtype)
    weight = torch.ones(shape.outputs, shape.inputs, dtype=dtype)
    return [lambda: x @ weight.mT, lambda: g @ weight, lambda: g.mT @ x]


def _seconds(product: Callable[[], Tensor]) -> float:
    """Return the best CPU time of several: wall time counts what other programs take on a busy machine."""
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < PATIENCE:
        start = time.thread_time()
        product()
        times.append(time.thread_time() - start)
    return min(times)
