"""mask and inspect on a large Fisher, against reading its file: seconds, CPU seconds, memory, share of reading speed.

    python benchmarks/fisher_files.py --size 1GB
    python benchmarks/fisher_files.py --size 5GB --cold

Each side is a fresh process, its start included; sides take turns and the fastest turn counts. ``inspect`` has no
sidecar to read from: it adds up the whole file. --cold has the system forget the file before every turn, so that the
disk is the limit.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from processes import Took, evict, measure

from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.floats import narrow
from fisherkit.options import parse_bytes

READ = "cat"
MASKS = {
    "mask fggm": ["--preset", "fggm"],
    "mask fish": ["--preset", "fish"],
    "mask ssu": ["--preset", "ssu"],
    "mask entries": ["--protect", "top", "--keep", "0.1", "--aggregate", "none"],
    "mask global": ["--protect", "top", "--keep", "0.1", "--aggregate", "none", "--scope", "global"],
    "mask layer": ["--train", "top", "--keep", "0.3", "--scope", "layer"],
    "mask random": ["--train", "top", "--score", "random", "--seed", "1"],
    "mask svd": ["--svd-rank", "8"],
}
SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.up_proj": (5632, 2048),
    "mlp.down_proj": (2048, 5632),
}
_ROWS = 512


def main() -> None:
    """Make the Fisher, let the sides take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GB")
    parser.add_argument("--sides", default=",".join(["inspect", *MASKS]), help="which of %(default)s")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a calm moment, per turn")
    parser.add_argument("--cold", action="store_true", help="have the system forget the file before every turn")
    parser.add_argument("--folder", help="keep the Fisher here (a temporary folder otherwise)")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-files-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fisher = _make(folder / f"fisher-{options.size}.safetensors", parse_bytes("size", options.size))
        commands = {READ: ["sh", "-c", f"cat {fisher} > /dev/null"]}
        commands |= {side: _command(side, fisher, folder / "mask.safetensors") for side in options.sides.split(",")}
        best: dict[str, Took] = {}
        for _ in range(options.repeat):
            for side, command in commands.items():
                if options.cold:
                    evict([fisher])
                took = measure(command, patience=options.patience)
                best[side] = min(best.get(side, took), took, key=lambda one: one.seconds)
        _print(fisher, best)
    finally:
        if not options.folder:
            shutil.rmtree(folder)


def _command(side: str, fisher: Path, out: Path) -> list[str]:
    ours = [sys.executable, "-m", "fisherkit"]
    if side == "inspect":
        return [*ours, "inspect", str(fisher)]
    return [*ours, "mask", str(fisher), "-o", str(out), "--force", "-q", *MASKS[side]]


def _print(fisher: Path, best: dict[str, Took]) -> None:
    size = fisher.stat().st_size
    print(f"{fisher.name}: {size / 1e9:.2f} GB")
    for side, took in best.items():
        rate, share = size / took.seconds / 1e6, best[READ].seconds / took.seconds
        print(
            f"{side:14}{took.seconds:8.2f} s{took.cpu:8.2f} CPU-s{took.private / 1e6:8,.0f} MB{rate:8,.0f} MB/s"
            f"{share:8.0%} of reading speed   others {took.others:.0%}"
        )


def _make(path: Path, size: int) -> Path:
    """Write a Fisher as random numbers have it, squares of normal ones times scales of rows and columns."""
    if path.exists():
        return path
    block = 2 * sum(rows * columns for rows, columns in SHAPES.values())
    specs = [
        TensorSpec(f"model.layers.{layer}.{name}.weight", "BF16", shape)
        for layer in range(max(1, round(size / block)))
        for name, shape in SHAPES.items()
    ]
    work = path.with_name(path.name + ".partial")
    with StreamedWriter.create(path, specs, work=work) as writer:
        for number, spec in enumerate(specs):
            random = np.random.default_rng(number)
            columns = random.standard_gamma(0.5, spec.shape[1]).astype(np.float32) * np.float32(1e-9)
            for start in range(0, spec.shape[0], _ROWS):
                rows = random.standard_gamma(0.5, (min(_ROWS, spec.shape[0] - start), 1)).astype(np.float32)
                squares = np.square(random.standard_normal((len(rows), spec.shape[1]), dtype=np.float32))
                stored = narrow(squares * rows * columns, "BF16")
                writer.write_stored(spec.name, stored.reshape(-1), start * spec.shape[1])
            writer.mark_written([spec.name])
        writer.finish()
    return path


if __name__ == "__main__":
    main()
