"""Squared gradients of one weight: the fused kernel against plain torch, and against the card's matrix products."""

import torch
from torch import Tensor

from benchmarks.gpu.card import gemm_rate, seconds
from fisherkit.kernels import fused
from fisherkit.kernels.fisher import add_squared_tiles_

HEADER = ("dtype", "weight", "samples x tokens", "plain", "fused", "faster", "of the GEMM rate", "differs from float64")


def rows(device: torch.device, *, sizes: tuple[int, ...] = (2048, 5376), samples: int = 8) -> list[tuple[str, ...]]:
    """Return a row for each dtype, size of the weight and length of the samples."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        rate = gemm_rate(dtype, device, size=8192 if device.type == "cuda" else 256)
        for size in sizes:
            for tokens in (64, 256, 1024):
                x, g = (torch.randn(samples * tokens, size, device=device).to(dtype) for _ in range(2))
                found.append(_row(list(x.split(tokens)), list(g.split(tokens)), rate))
    return found


def _row(inputs: list[Tensor], grads: list[Tensor], rate: float) -> tuple[str, ...]:
    device, size = inputs[0].device, inputs[0].shape[1]
    fisher = torch.zeros(size, size, device=device)
    plain = seconds(lambda: add_squared_tiles_(fisher, inputs, grads), device)
    tile = fused.fused_tile(add_squared_tiles_, inputs, device)
    usable = device.type == "cuda" and fused.works(add_squared_tiles_, device)
    quick = plain
    if usable:
        from fisherkit.kernels.triton_fisher import TILES

        tile = tile or TILES[0]
        quick = seconds(lambda: fused.add_fused_(fisher, inputs, grads, tile), device)
    operations = 2 * size * size * sum(map(len, inputs))
    return (
        str(inputs[0].dtype).removeprefix("torch."),
        f"{size} x {size}",
        f"{len(inputs)} x {len(inputs[0])}",
        f"{1e3 * plain:.3f} ms",
        f"{1e3 * quick:.3f} ms" if usable else "not there",
        f"x{plain / quick:.2f}",
        f"{operations / quick / rate:.0%} of {rate / 1e12:.3g} TFLOP/s",
        _error(inputs, grads, tile if usable else None),
    )


def _error(inputs: list[Tensor], grads: list[Tensor], tile: object) -> str:
    """Return how far a corner of the result is from the formula in float64."""
    corner = slice(0, 256)
    xs, gs = [x[:, corner].contiguous() for x in inputs], [g[:, corner].contiguous() for g in grads]
    found = torch.zeros(gs[0].shape[1], xs[0].shape[1], device=xs[0].device)
    add_squared_tiles_(found, xs, gs) if tile is None else fused.add_fused_(found, xs, gs, tile)
    wanted = sum((g.cpu().double().mT @ x.cpu().double()).square() for x, g in zip(xs, gs, strict=True))
    return f"{float((found.cpu() - wanted).norm() / wanted.norm()):.1e}"
