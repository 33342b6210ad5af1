"""top_modes against torch.linalg.svd and torch.svd_lowrank: time, accuracy, and the machine's GEMM rate.

    python benchmarks/subspace.py

All sides see the same matrices in one process; the large matrix is read from a file some rows at a time, in a process
of its own, which shows the memory that takes. The GEMM rate is measured right before and right after each side, because
the machines this runs on are shared and noisy.

gap      singular values of a power law, with 10 % between those that are wanted and the rest
fisher   an outer product of squares times the square of noise, as a diagonal Fisher looks
noise    no structure and no gap at all: the most work, for directions that mean nothing. Its angles are no error; what
         counts is the share of the best possible energy
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fisherkit.kernels.range_finder import RowBlocks
from fisherkit.kernels.subspace import Modes, top_modes

Triple = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    """Compare the sides on both matrices, then measure the large one."""
    options = _options()
    if options.file:
        print(json.dumps(_large(options)))
        return
    size, rank = options.size, options.rank
    print(f"{size} x {size} float32, rank {rank}, {torch.get_num_threads()} threads")
    for name, make in (("gap", _with_gap), ("fisher", _fisher), ("noise", _noise)):
        _compare(name, make(size, rank), rank)
    _print_large(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--large", type=int, nargs=2, default=(21504, 5376), metavar=("O", "I"))
    parser.add_argument("--file", help=argparse.SUPPRESS)
    return parser.parse_args()


# Matrices


def _with_gap(size: int, rank: int) -> Tensor:
    at = torch.arange(size)
    s = torch.where(at < rank, 1.0, 0.9) / (at + 1) ** 0.5
    u, v = (torch.linalg.qr(_normal(size, size, seed=seed)).Q for seed in (1, 2))
    return (u * s) @ v.T


def _fisher(size: int, rank: int) -> Tensor:
    return _fisher_rows(size, size, seed=2)


def _fisher_rows(height: int, width: int, seed: int) -> Tensor:
    outer = _normal(height, 1, seed=seed + 1).square() @ _normal(1, width, seed=1).square()
    return outer * _normal(height, width, seed=seed).square() * 1e-9


def _noise(size: int, rank: int) -> Tensor:
    return _normal(size, size, seed=4)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Sides


def _compare(name: str, matrix: Tensor, rank: int) -> None:
    sides: dict[str, Callable[[], Triple]] = {
        "top_modes": lambda: _triple(top_modes(matrix, rank)),
        "svd_lowrank": lambda: torch.svd_lowrank(matrix, rank + 16, niter=4),
        "linalg.svd": lambda: _transposed(torch.linalg.svd(matrix, full_matrices=False)),
    }
    found = {side: _timed(run, repeats=1 if side == "linalg.svd" else 5) for side, run in sides.items()}
    u, s, v = found["linalg.svd"][0]
    best = float(s[:rank].square().sum())
    for side, ((a, sizes, b), seconds, rate) in found.items():
        angle = max(_angle(a[:, :rank], u[:, :rank]), _angle(b[:, :rank], v[:, :rank]))
        error = float((sizes[:rank] / s[:rank] - 1).abs().max())
        energy, faster = float(sizes[:rank].square().sum()) / best, found["linalg.svd"][1] / seconds
        print(
            f"{name:7} {side:12} {seconds:6.2f} s {faster:4.0f}x   GEMM {rate / 1e9:,.0f} GFLOP/s"
            f"   angle {angle:.0e}   singular values {error:.0e}   energy {energy:.4f} of the best",
            flush=True,
        )


def _triple(modes: Modes) -> Triple:
    return modes.u, modes.s, modes.v


def _transposed(found: Triple) -> Triple:
    return found[0], found[1], found[2].mT


def _angle(found: Tensor, expected: Tensor) -> float:
    """Sine of the largest principal angle."""
    a, b = found.double(), expected.double()
    return float(torch.linalg.matrix_norm(b - a @ (a.T @ b), 2))


def _timed(run: Callable[[], Triple], repeats: int) -> tuple[Triple, float, float]:
    """Result, median seconds, and the mean of the GEMM rates before and after."""
    before, times = _gemm_rate(), []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - started)
    return result, sorted(times)[repeats // 2], (before + _gemm_rate()) / 2


def _gemm_rate() -> float:
    a = torch.ones(2048, 2048)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


# The large matrix, in its own process


def _print_large(options: argparse.Namespace) -> None:
    height, width = options.large
    with tempfile.TemporaryDirectory(prefix="fisherkit-subspace-") as folder:
        path = Path(folder) / "matrix.bf16"
        with path.open("wb") as file:
            for start in range(0, height, 1024):
                rows = _fisher_rows(min(1024, height - start), width, seed=start + 5)
                file.write(rows.bfloat16().view(torch.int16).numpy().tobytes())
        command = [sys.executable, __file__, "--file", str(path), "--rank", str(options.rank)]
        command += ["--large", str(height), str(width)]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(
        f"{height} x {width} bfloat16 from a file, rank {options.rank}: "
        f"{found['seconds']:.2f} s in {found['passes']} passes; "
        f"products at {found['rate'] / 1e9:,.0f} GFLOP/s would take {found['products']:.2f} s; "
        f"peak {found['peak_mb'] - found['base_mb']:,.0f} MB above {found['base_mb']:,.0f} (the matrix has "
        f"{2 * height * width / 1e6:,.0f} MB, {4 * height * width / 1e6:,.0f} in float32)"
    )


def _large(options: argparse.Namespace) -> dict[str, float]:
    (height, width), rank = options.large, options.rank
    file, asked = os.open(options.file, os.O_RDONLY), 0

    def rows(start: int, stop: int) -> Tensor:
        nonlocal asked
        asked += stop - start
        data = bytearray(os.pread(file, 2 * (stop - start) * width, 2 * start * width))
        return torch.frombuffer(data, dtype=torch.bfloat16).view(stop - start, width)

    top_modes(_normal(1000, 1000, seed=0), 8)  # what libraries set up on first use is not ours
    before, base = _gemm_rate(), _peak_mb()
    started = time.perf_counter()
    top_modes(RowBlocks((height, width), rows), rank)
    seconds, peak = time.perf_counter() - started, _peak_mb()
    rate, passes = (before + _gemm_rate()) / 2, asked // height
    products = 2.0 * height * width * (rank + 16) * (passes - 1) / rate  # the first pass takes the norm
    return {
        "seconds": seconds,
        "passes": passes,
        "products": products,
        "rate": rate,
        "peak_mb": peak,
        "base_mb": base,
    }


def _peak_mb() -> float:
    """Largest resident memory of this process so far; getrusage would count the one it was forked from."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
