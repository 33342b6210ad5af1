"""extract on the device: against the published recipe and the plain loop, and on blocks of the 31B shape."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import fisherkit
from benchmarks import checkpoints
from benchmarks import extract as scripts
from benchmarks.gpu.card import forget_peak, gemm_rate, peak_bytes, synchronize
from benchmarks.gpu.overlap import traced
from fisherkit.methods.extract.prepare import Prepared
from fisherkit.options import ExtractOptions

HEADER = ("way", "time", "4F at the GEMM rate", "device memory", "planned")


class Shape(NamedTuple):
    """A Llama with random weights, and what goes through it."""

    blocks: int
    hidden: int
    intermediate: int
    samples: int
    tokens: int

    @property
    def block_weights(self) -> int:
        """Weights of one block's matrices."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate

    @property
    def four_forwards(self) -> float:
        """Operations of four forwards of all blocks."""
        return 4.0 * 2 * self.blocks * self.block_weights * self.samples * self.tokens

    def words(self) -> str:
        """Describe it."""
        return (
            f"{self.blocks} blocks of {self.hidden} and {self.intermediate} channels in bfloat16, "
            f"{self.blocks * self.block_weights / 1e9:.3g} G weights, {self.samples} samples of {self.tokens} tokens"
        )


MANY = Shape(24, 2048, 5632, 128, 256)
LARGE = Shape(4, 5376, 21504, 200, 256)
"""Four of the sixty blocks of a 31B model."""


def against_scripts(shape: Shape, device: torch.device, folder: Path) -> list[tuple[str, ...]]:
    """Return a row for extract with its weights kept on the device, with weights that come and go, and for scripts."""
    model, prompts = _make(shape, folder)
    rate = _rate(device)
    group = 8
    ways: dict[str, Callable[[], object]] = {
        "extract, the first time": lambda: _extract(model, prompts, folder / "a.pt", shape, device, group_size=group),
        "extract": lambda: _extract(model, prompts, folder / "a.pt", shape, device, group_size=group),
        "extract, weights streamed": lambda: _streamed(model, prompts, folder / "a.pt", shape, device, group),
        "recipe, 8 layers a pass": lambda: scripts._script(model, prompts, folder / "r.pt", shape.tokens, 8, device),
        "loop, all at once": lambda: scripts._script(model, prompts, folder / "l.pt", shape.tokens, 10**6, device),
    }
    planned = _planned(model, prompts, shape, device, group)
    return [
        _row(name, way, shape, rate, device, planned if name.startswith("extract") else "")
        for name, way in ways.items()
    ]


def large_blocks(shape: Shape, device: torch.device, folder: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return a row for a run with one block at a time, and lines on how it grows to 60 blocks and on its copies."""
    model, prompts = _make(shape, folder)
    rate, out, started = _rate(device), folder / "a.pt", time.perf_counter()
    planned = _planned(model, prompts, shape, device, 1)
    row = _row(
        "extract, group size 1",
        lambda: _streamed(model, prompts, out, shape, device, 1),
        shape,
        rate,
        device,
        planned,
    )
    each = (time.perf_counter() - started) / shape.blocks
    lines = [f"{each:.2f} s a block, start-up and writing included; 60 blocks by proportion: {60 * each:.0f} s"]
    if device.type == "cuda":
        trace = traced(lambda: _streamed(model, prompts, out, shape, device, 1))
        lines += [trace.words(), trace.against(shape.four_forwards / rate, shape.blocks)]
    return [row], lines


def _make(shape: Shape, folder: Path) -> tuple[Path, Path]:
    name = f"llama-{shape.blocks}x{shape.hidden}"
    model = checkpoints.make(
        folder / name, blocks=shape.blocks, hidden=shape.hidden, intermediate=shape.intermediate, dtype="bfloat16"
    )
    return model, checkpoints.prompts(folder / f"{name}.jsonl", samples=shape.samples, tokens=shape.tokens)


def _options(shape: Shape, device: torch.device, group_size: int) -> ExtractOptions:
    return ExtractOptions(
        max_length=shape.tokens,
        limit=None,
        group_size=group_size,
        device=str(device),
        dtype="bfloat16",
        engine="stream",
        force=True,
    )


def _extract(model: Path, prompts: Path, out: Path, shape: Shape, device: torch.device, group_size: int) -> None:
    fisherkit.extract(model, prompts, out, _options(shape, device, group_size))


def _streamed(model: Path, prompts: Path, out: Path, shape: Shape, device: torch.device, group_size: int) -> None:
    """Run as where the weights do not fit the device, though these would."""
    fit = Prepared.weights_fit
    Prepared.weights_fit = lambda self: False  # type: ignore[method-assign]
    try:
        _extract(model, prompts, out, shape, device, group_size)
    finally:
        Prepared.weights_fit = fit  # type: ignore[method-assign]


def _planned(model: Path, prompts: Path, shape: Shape, device: torch.device, group_size: int) -> str:
    plan = fisherkit.plan_extract(model, prompts, _options(shape, device, group_size))
    return f"{plan['peak_bytes']['device'] / 1e9:.1f} GB"


def _rate(device: torch.device) -> float:
    return gemm_rate(torch.bfloat16, device, size=8192 if device.type == "cuda" else 256)


def _row(
    name: str, way: Callable[[], object], shape: Shape, rate: float, device: torch.device, planned: str
) -> tuple[str, ...]:
    forget_peak(device)
    started = time.perf_counter()
    way()
    synchronize(device)
    seconds = time.perf_counter() - started
    ideal = shape.four_forwards / rate
    return (
        name,
        f"{seconds:.1f} s",
        f"{ideal:.2f} s ({ideal / seconds:.0%})",
        f"{peak_bytes(device) / 1e9:.1f} GB",
        planned,
    )
