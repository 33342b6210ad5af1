"""Fused kernel for CUDA: F += sum_n (G_n^T X_n)^2 with both the product and the square in registers.

Axes: R rows (the tokens of all samples, one sample behind the other), O outputs, I inputs, N samples.
A plain product writes an O x I gradient per sample to memory and reads it back, about 14 bytes per entry against 2 T
operations for T tokens. Here each program keeps one tile of the Fisher: it runs over the samples, sums a sample's
outer products in float32, adds the square, and writes the tile once.

Triton compiles it when it is first used; with TRITON_INTERPRET=1 set before this file is imported, numpy runs it on the
CPU. ``kernels.fisher`` has the plain way, which is its oracle.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of inputs and gradients."""
_TUNED_ON, _TUNED_SAMPLES = 4096, 8  # channels of the weight that ways are compared on, and samples
_NEIGHBOURS = 8  # tiles of rows that are made at a time, so that what they read is still in the second cache


class Tile(NamedTuple):
    """Sizes of what one program holds, and how it is compiled."""

    outputs: int
    inputs: int
    rows: int
    warps: int
    stages: int


TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 32, 8, 4),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 32, 4, 4),
)
"""Largest first: two float32 tiles of 128 x 128 are half of a multiprocessor's registers."""


@triton.jit
def _kernel(
    fisher,
    gradients,
    inputs,
    ends,
    samples,
    size_o,
    size_i,
    fisher_o,
    fisher_i,
    gradient_r,
    gradient_o,
    input_r,
    input_i,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_R: tl.constexpr,
):
    down, across = (size_o + TILE_O - 1) // TILE_O, (size_i + TILE_I - 1) // TILE_I
    band = tl.program_id(0) // (NEIGHBOURS * across)
    first = band * NEIGHBOURS
    height = tl.minimum(down - first, NEIGHBOURS)
    within = tl.program_id(0) % (NEIGHBOURS * across)
    o = (first + within % height) * TILE_O + tl.arange(0, TILE_O)
    i = (within // height) * TILE_I + tl.arange(0, TILE_I)
    total = tl.full((TILE_O, TILE_I), 0.0, tl.float32)
    start = tl.load(ends)
    for n in range(samples):
        stop = tl.load(ends + n + 1)
        gradient = tl.full((TILE_O, TILE_I), 0.0, tl.float32)
        for at in range(start, stop, TILE_R):
            r = at + tl.arange(0, TILE_R)
            wide = r.to(tl.int64)
            g = tl.load(
                gradients + wide[None, :] * gradient_r + o[:, None] * gradient_o,
                mask=(r[None, :] < stop) & (o[:, None] < size_o),
                other=0.0,
            )
            x = tl.load(
                inputs + wide[:, None] * input_r + i[None, :] * input_i,
                mask=(r[:, None] < stop) & (i[None, :] < size_i),
                other=0.0,
            )
            if WIDEN:  # the interpreter multiplies bfloat16's bits as whole numbers
                g, x = g.to(tl.float32), x.to(tl.float32)
            gradient = tl.dot(g, x, gradient, input_precision=PRECISION)
        total += gradient * gradient
        start = stop
    place = fisher + o[:, None].to(tl.int64) * fisher_o + i[None, :].to(tl.int64) * fisher_i
    inside = (o[:, None] < size_o) & (i[None, :] < size_i)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def add_squared_linear_grads_(fisher: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor], tile: Tile) -> None:
    """fisher[O,I] += sum_n (dl_n/dW)^2, as the plain kernel of the same name.

    Args:
        fisher: float32 accumulator [O, I], of any strides, changed in place.
        inputs: per sample the layer's input x_n [T_n, I], of one of DTYPES.
        grads: per sample the gradient g_n [T_n, O] of its loss at the layer's output, same dtype as the input.
        tile: of TILES.
    """
    x, g = _joined(inputs), _joined(grads)
    ends = _ends(tuple(map(len, inputs)), fisher.device)
    size_o, size_i = fisher.shape
    exact = not torch.backends.cuda.matmul.allow_tf32
    count = triton.cdiv(size_o, tile.outputs) * triton.cdiv(size_i, tile.inputs)
    options: dict[str, Any] = {} if INTERPRETED else {"num_warps": tile.warps, "num_stages": tile.stages}
    _kernel[(count,)](
        fisher,
        g,
        x,
        ends,
        len(ends) - 1,
        size_o,
        size_i,
        *fisher.stride(),
        *g.stride(),
        *x.stride(),
        PRECISION="ieee" if exact and x.dtype == torch.float32 else "tf32",
        WIDEN=INTERPRETED,
        NEIGHBOURS=_NEIGHBOURS,
        TILE_O=tile.outputs,
        TILE_I=tile.inputs,
        TILE_R=tile.rows,
        **options,
    )


def _joined(samples: Sequence[Tensor]) -> Tensor:
    return samples[0] if len(samples) == 1 else torch.cat(list(samples))


@functools.lru_cache(maxsize=256)  # all layers of all blocks see the same batches
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the row behind each sample, [N + 1] int32, a zero first."""
    rows = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return rows.to(device, non_blocking=True)


@functools.lru_cache
def fastest(plain: Callable[..., None], dtype: torch.dtype, magnitude: int, device: torch.device) -> Tile | None:
    """Return the fastest tile for samples of 2^magnitude tokens, measured here; None where the plain way is faster.

    Args:
        plain: called with a Fisher, inputs and gradients.
        dtype: of inputs and gradients.
        magnitude: see above.
        device: to measure on.
    """
    x = torch.randn(1 << magnitude, _TUNED_ON, device=device).to(dtype)
    fisher, samples = torch.zeros(_TUNED_ON, _TUNED_ON, device=device), [x] * _TUNED_SAMPLES
    ways: dict[Tile | None, Callable[[], None]] = {None: functools.partial(plain, fisher, samples, samples)}
    for tile in TILES:
        ways[tile] = functools.partial(add_squared_linear_grads_, fisher, samples, samples, tile)
    times: dict[Tile | None, float] = {}
    for chosen, way in ways.items():
        try:
            times[chosen] = triton.testing.do_bench(way, warmup=5, rep=20, return_mode="min")
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue  # more than this card's registers or shared memory
    return min(times, key=times.__getitem__)
