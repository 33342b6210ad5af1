"""A checkpoint larger than the memory that may be used: 5 GB of bf16 weights within 3 GB, enforced by the kernel.

    python benchmarks/limit.py --memory 3GB                   extract
    python benchmarks/limit.py --memory 3GB --command score   score

The limit is a memory cgroup (v2 or v1; needs root), in which files that the kernel can drop don't count against us but
everything that we hold does; without the right to make one it is RLIMIT_DATA, which counts all private memory.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints

from fisherkit.options import parse_bytes

CGROUPS = (  # folder, file of the limit
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)


def main() -> None:
    """Make the checkpoint, run the command under the limit, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--command", choices=("extract", "score"), default="extract")
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--folder", help="keep the checkpoint here (a temporary folder otherwise)")
    options = parser.parse_args()
    limit = parse_bytes("memory", options.memory)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-limit-"))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"llama-{options.blocks}x{options.hidden}-bfloat16"
    model = checkpoints.make(
        folder / name,
        blocks=options.blocks,
        hidden=options.hidden,
        intermediate=11 * options.hidden // 4,
        dtype="bfloat16",
    )
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    prompts = checkpoints.prompts(folder / "prompts.jsonl", samples=options.samples, tokens=64)
    out = folder / ("limit.pt" if options.command == "extract" else "limit.jsonl")
    outputs = [str(prompts), "-o", str(out)]
    if options.command == "score":
        outputs = ["--prompts", str(prompts), "--samples", str(out)]
    command = [sys.executable, "-m", "fisherkit", options.command, str(model), *outputs]
    command += ["--group-size", "2", "--max-length", "64", "--force", "-q"]
    print(f"{name}: {size / 1e9:.2f} GB of weights, {options.samples} samples of 64 tokens, --group-size 2")
    started = time.monotonic()
    how, peak = _run_limited(command, limit)
    print(
        f"finished in {time.monotonic() - started:.0f} s under {how} of {limit / 1e9:.1f} GB; "
        f"peak resident {peak / 1e9:.2f} GB; wrote {out.stat().st_size / 1e9:.2f} GB"
    )


def _run_limited(command: list[str], limit: int) -> tuple[str, int]:
    group = _cgroup(limit)
    if group is None:
        _wait(command, lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
        return "RLIMIT_DATA", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    try:
        _wait(command, lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    finally:
        group.rmdir()
    return "a memory cgroup", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _wait(command: list[str], enter: Callable[[], object]) -> None:
    done = subprocess.run(command, preexec_fn=enter, check=False)
    if done.returncode:
        sys.exit(f"the command ended with {done.returncode}")


def _cgroup(limit: int) -> Path | None:
    """A fresh memory cgroup with this limit, None where we may not make one."""
    for root, file in CGROUPS:
        group = root / f"fisherkit-{os.getpid()}"
        try:
            if not (root / "cgroup.procs").is_file():
                continue
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return group
    return None


if __name__ == "__main__":
    main()
