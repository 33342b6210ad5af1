"""Fused kernel for CUDA: F += sum_n (G_n^T X_n)^2 with both the product and the square in registers.

Axes: R rows (the tokens of all samples, one sample behind the other), O outputs, I inputs, N samples.
A plain product writes an O x I gradient per sample to memory and reads it back, about 14 bytes per entry against 2 T
operations for T tokens. Here each program keeps one tile of the Fisher: it runs over the samples, sums a sample's
outer products in float32, adds the square, and writes the tile once.

Samples are filled up with rows of zeros to whole steps, so that one loop without masks runs over all of them: what the
next sample needs is on its way while this one is squared. From Hopper on, the copy engine fetches the steps (TMA).

Triton compiles it when it is first used; with TRITON_INTERPRET=1 set before this file is imported, numpy runs it on the
CPU. ``kernels.fisher`` has the plain way, which is its oracle.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton before 3.4
    TensorDescriptor = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of inputs and gradients."""
_TUNED_ON, _TUNED_SAMPLES = 4096, 8  # channels of the weight that ways are compared on, and samples
_NEIGHBOURS = 8  # tiles of rows that are made at a time, so that what they read is still in the second cache
_LEAST_ROWS, _MOST_ROWS = 16, 64  # of a step: what a product needs, what shared memory holds several times
_TOLERANCE = 1e-2  # relative; a plain product of 16-bit numbers is rounded before it is squared
_ROWS_AT_ONCE = 4096  # of samples that are filled up, unless a single one has more


class Tile(NamedTuple):
    """Sizes of what one program holds, and how it is compiled.

    Attributes:
        outputs: rows of the Fisher's tile.
        inputs: columns of it.
        warps: that share the work.
        stages: steps that are on their way at a time.
        bulk: steps are fetched by the copy engine, which takes 16-bit numbers in rows of whole 16 bytes.
        rows: tokens of a step.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int
    bulk: bool = False
    rows: int = _MOST_ROWS


TILES = (
    Tile(128, 128, 8, 4, bulk=True),
    Tile(128, 128, 4, 3, bulk=True),
    Tile(128, 128, 8, 3),
    Tile(64, 128, 4, 4),
    Tile(64, 64, 4, 2),
)
"""Two float32 tiles of 128 x 128 are half of a multiprocessor's registers; the last one fits every card."""


@triton.jit
def _kernel(
    fisher,
    gradients,
    inputs,
    lasts,
    steps,
    size_o,
    size_i,
    fisher_o,
    fisher_i,
    gradient_r,
    gradient_o,
    input_r,
    input_i,
    BULK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_R: tl.constexpr,
):
    down, across = (size_o + TILE_O - 1) // TILE_O, (size_i + TILE_I - 1) // TILE_I
    band = tl.program_id(0) // (NEIGHBOURS * across)
    height = tl.minimum(down - band * NEIGHBOURS, NEIGHBOURS)
    within = tl.program_id(0) % (NEIGHBOURS * across)
    top, left = (band * NEIGHBOURS + within % height) * TILE_O, (within // height) * TILE_I
    o, i = top + tl.arange(0, TILE_O), left + tl.arange(0, TILE_I)
    if not BULK:  # what lies beyond the weight is computed as well, from other channels, and not written
        r = tl.arange(0, TILE_R).to(tl.int64)
        g_at = gradients + r[None, :] * gradient_r + (o % size_o)[:, None] * gradient_o
        x_at = inputs + r[:, None] * input_r + (i % size_i)[None, :] * input_i
    total = tl.full((TILE_O, TILE_I), 0.0, tl.float32)
    gradient = tl.full((TILE_O, TILE_I), 0.0, tl.float32)
    for step in range(steps):
        if BULK:
            g, x = gradients.load([step * TILE_R, top]).T, inputs.load([step * TILE_R, left])
        else:
            g, x = tl.load(g_at), tl.load(x_at)
            g_at += TILE_R * gradient_r
            x_at += TILE_R * input_r
        if WIDEN:  # the interpreter multiplies bfloat16's bits as whole numbers
            g, x = g.to(tl.float32), x.to(tl.float32)
        gradient = tl.dot(g, x, gradient, input_precision=PRECISION)
        if tl.load(lasts + step) != 0:
            total += gradient * gradient
            gradient = tl.full((TILE_O, TILE_I), 0.0, tl.float32)
    place = fisher + o[:, None].to(tl.int64) * fisher_o + i[None, :].to(tl.int64) * fisher_i
    inside = (o[:, None] < size_o) & (i[None, :] < size_i)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def add_squared_linear_grads_(fisher: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor], tile: Tile) -> None:
    """fisher[O,I] += sum_n (dl_n/dW)^2, as the plain kernel of the same name.

    Args:
        fisher: float32 accumulator [O, I], of any strides, changed in place.
        inputs: per sample the layer's input x_n [T_n, I], of one of DTYPES.
        grads: per sample the gradient g_n [T_n, O] of its loss at the layer's output, same dtype as the input.
        tile: of TILES. Where the copy engine cannot fetch these rows, they are read as without ``bulk``.
    """
    pairs = [(x, g) for x, g in zip(inputs, grads, strict=True) if len(x)]
    inputs, grads = [x for x, _ in pairs], [g for _, g in pairs]
    for start, stop in _together([_filled_up(len(x), tile.rows) for x in inputs]):
        lengths = tuple(map(len, inputs[start:stop]))
        x, g = _joined(inputs[start:stop], tile.rows), _joined(grads[start:stop], tile.rows)
        _launch(fisher, x, g, _lasts(lengths, tile.rows, fisher.device), tile)


def _launch(fisher: Tensor, x: Tensor, g: Tensor, lasts: Tensor, tile: Tile) -> None:
    size_o, size_i = fisher.shape
    exact = not torch.backends.cuda.matmul.allow_tf32
    count = triton.cdiv(size_o, tile.outputs) * triton.cdiv(size_i, tile.inputs)
    options: dict[str, Any] = {} if INTERPRETED else {"num_warps": tile.warps, "num_stages": tile.stages}
    bulk = tile.bulk and _has_copy_engine(x.device) and _can_fetch(x) and _can_fetch(g)
    _kernel[(count,)](
        fisher,
        TensorDescriptor.from_tensor(g, [tile.rows, tile.outputs]) if bulk else g,
        TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs]) if bulk else x,
        lasts,
        len(lasts),
        size_o,
        size_i,
        *fisher.stride(),
        *g.stride(),
        *x.stride(),
        BULK=bulk,
        PRECISION="ieee" if exact and x.dtype == torch.float32 else "tf32",
        WIDEN=INTERPRETED,
        NEIGHBOURS=_NEIGHBOURS,
        TILE_O=tile.outputs,
        TILE_I=tile.inputs,
        TILE_R=tile.rows,
        **options,
    )


def _can_fetch(rows: Tensor) -> bool:
    """Return whether the copy engine takes these rows."""
    return rows.element_size() == 2 and rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0


@functools.lru_cache
def _has_copy_engine(device: torch.device) -> bool:
    if TensorDescriptor is None:
        return False
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (9, 0)


def _filled_up(length: int, rows: int) -> int:
    return -(-length // rows) * rows


def _together(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of samples that are joined at a time."""
    start = rows = 0
    for number, length in enumerate(lengths):
        if rows and rows + length > _ROWS_AT_ONCE:
            yield start, number
            start, rows = number, 0
        rows += length
    if rows:
        yield start, len(lengths)


def _joined(samples: Sequence[Tensor], rows: int) -> Tensor:
    """Return the samples behind each other, each with rows of zeros behind it up to whole steps.

    Without a copy where they lie so in memory already.
    """
    first = samples[0]
    if _are_one(samples) and all(len(sample) % rows == 0 for sample in samples):
        return first.as_strided((sum(map(len, samples)), first.shape[1]), first.stride())
    zeros = first.new_zeros(1, first.shape[1])
    parts = ((sample, zeros.expand(-len(sample) % rows, -1)) for sample in samples)
    return torch.cat([part for both in parts for part in both])


def _are_one(samples: Sequence[Tensor]) -> bool:
    """Return whether samples are parts of one tensor, behind each other."""
    first = samples[0]
    memory, at = first.untyped_storage().data_ptr(), first.storage_offset()
    for sample in samples:
        here = sample.untyped_storage().data_ptr(), sample.storage_offset(), sample.stride()
        if here != (memory, at, first.stride()):  # another tensor may lie behind this one by chance
            return False
        at += len(sample) * first.stride(0)
    return True


@functools.lru_cache(maxsize=256)  # all layers of all blocks see the same batches
def _lasts(lengths: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """Return for each step whether a sample ends with it, [steps] int32."""
    counts = torch.tensor([_filled_up(length, rows) // rows for length in lengths])
    lasts = torch.zeros(int(counts.sum()), dtype=torch.int32)
    lasts[counts.cumsum(0) - 1] = 1
    return lasts.to(device, non_blocking=True)


@functools.lru_cache
def fastest(plain: Callable[..., None], dtype: torch.dtype, magnitude: int, device: torch.device) -> Tile | None:
    """Return the fastest tile for samples of 2^magnitude tokens, measured here; None where the plain way is faster.

    A tile that does not agree with the plain way is left out.

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
        if not tile.bulk or (_has_copy_engine(device) and dtype.itemsize == 2):
            sized = tile._replace(rows=min(max(1 << magnitude, _LEAST_ROWS), _MOST_ROWS))
            ways[sized] = functools.partial(add_squared_linear_grads_, fisher, samples, samples, sized)
    times: dict[Tile | None, float] = {}
    wanted: Tensor | None = None
    for chosen, way in ways.items():
        try:
            fisher.zero_()
            way()
            wanted = fisher.clone() if wanted is None else wanted
            if not float((fisher - wanted).norm()) < _TOLERANCE * float(wanted.norm()):
                continue
            times[chosen] = triton.testing.do_bench(way, warmup=5, rep=20, return_mode="min")
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if chosen is None:
                raise
            continue  # more than this card's registers or shared memory, or what its compiler does not know
    return min(times, key=times.__getitem__)
