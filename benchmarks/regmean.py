"""Time of the solves of ``merge --regmean`` for a layer of an 8B model's shape, and bytes of the files to publish.

    OPENBLAS_NUM_THREADS=1 python benchmarks/regmean.py            # whole, a sketch of 1024 of the 14336 channels
    OPENBLAS_NUM_THREADS=1 python benchmarks/regmean.py --rank 512 # factors, as `extract --rank 512` writes them

Times are the process's CPU seconds, which do not depend on what else runs: with one thread, what one core of its own
would take. ``--share`` solves a part of each matrix's rows and scales up.

The layer is that of Llama 3.1 8B: queries [4096, 4096], keys and values [1024, 4096] on one input, the output
projection on another, gate and up [14336, 4096] on a third, down [4096, 14336] on a fourth. Covariances are of random
inputs with a decaying spectrum. Every matrix is solved, rounded to bfloat16 and put back, as merge does it; files are
not read or written. Peak memory is that of the process.
"""

import argparse
import os
import resource
import time

import numpy as np

from fisherkit.floats import narrow
from fisherkit.kernels.covariance import SKETCH_ABOVE, SKETCH_RANK, sketch_rank
from fisherkit.kernels.moment import Moment
from fisherkit.kernels.regmean import decompose
from fisherkit.kernels.tensor_pair import TensorPair
from fisherkit.pairs.solve import change_rows

LAYERS = 32
INPUTS = {"attention": 4096, "output": 4096, "gate and up": 4096, "down": 14336}
"""Channels of a layer's distinct inputs."""
WEIGHTS = {"attention": (4096, 1024, 1024), "output": (4096,), "gate and up": (14336, 14336), "down": (4096,)}
"""Rows of the matrices that read each."""
DAMPING = 1e-3


def main() -> None:
    """Print the time of each input's decomposition and matrices, and the whole model's."""
    options = _options()
    print(f"{os.cpu_count()} cores, numpy {np.__version__}, rank {options.rank or 'whole'}")
    total, tensors = 0.0, 0
    for name, size in INPUTS.items():
        rank = options.rank or (SKETCH_RANK if size > SKETCH_ABOVE else None)
        seconds = _input(name, size, rank, options.share)
        total += sum(seconds)
        tensors += len(WEIGHTS[name])
        shown = ", ".join(f"{one:.1f}" for one in seconds[1:])
        print(f"{name:12} decomposed in {seconds[0]:6.1f} s, matrices in {shown} s")
    print(
        f"a layer {total:.0f} s, {60 * tensors / total:.1f} tensors per minute, 32 layers {LAYERS * total / 60:.0f} min"
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    for rank, code in ((None, "F32"), (512, "BF16"), (256, "BF16")):
        nbytes = LAYERS * sum(_stored_bytes(size, rank, code) for size in INPUTS.values())
        print(f"file: {'whole' if rank is None else f'rank {rank}'}, {code}: {nbytes / 1e6:,.0f} MB")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=None, help="columns of all factors")
    parser.add_argument("--share", type=float, default=1.0, help="of each matrix's rows that are solved")
    return parser.parse_args()


def _input(name: str, size: int, rank: int | None, share: float) -> list[float]:
    """Seconds of a decomposition, and of each matrix that reads this input, scaled up from a share of its rows."""
    old, new = _moment(size, rank, 0), _moment(size, rank, 1)
    started = time.process_time()
    solver = decompose([(1.0, new)], old, DAMPING)
    seconds = [time.process_time() - started]
    for rows in WEIGHTS[name]:
        few = max(1, round(rows * share))
        pair = _pair(few, size)
        started = time.process_time()
        change_rows(
            pair,
            [],
            (few, size),
            input_axis=1,
            scale=1.0,
            change=lambda deltas, _: solver.solve(deltas, 1.0).delta,
        )
        seconds.append((time.process_time() - started) * rows / few)
    return seconds


def _moment(size: int, rank: int | None, seed: int) -> Moment:
    random = np.random.default_rng(seed)
    columns = random.standard_normal((size, rank or size // 4), np.float32) * 0.99 ** np.arange(rank or size // 4)
    if rank is None:
        return Moment((columns @ columns.T).astype(np.float64) + 1e-3 * np.eye(size))
    return Moment(None, np.linalg.qr(columns.astype(np.float64)).Q * 0.99 ** np.arange(rank), 1e-3)


def _stored_bytes(size: int, rank: int | None, code: str) -> int:
    kept = rank or sketch_rank(size)
    entries = size * (size + 1) // 2 if kept is None else size * kept
    return entries * (2 if code == "BF16" else 4)


def _pair(rows: int, columns: int) -> TensorPair:
    random = np.random.default_rng(2)
    base = random.standard_normal(rows * columns, np.float32)
    tuned = base + np.float32(1e-2) * random.standard_normal(rows * columns, np.float32)
    return TensorPair(narrow(base, "BF16"), "BF16", narrow(tuned, "BF16"), "BF16")


if __name__ == "__main__":
    main()
