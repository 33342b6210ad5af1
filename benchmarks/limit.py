"""Commands on a checkpoint larger than the memory they may use, enforced by the kernel; extract alone by default.

    python benchmarks/limit.py                              5 GB of bfloat16 weights within 3 GB
    python benchmarks/limit.py --command score              the same, for score
    python benchmarks/limit.py --size 24GB --memory 3GB     eight times the memory, through every command
    python benchmarks/limit.py --size 2GB --memory 1GB      the same, small, to try it out

With --size the checkpoint goes through ``extract``, ``mask --preset fggm``, ``fapm``, ``merge`` and ``score``, which
take turns on the disk: what no later command reads is deleted. It takes three times the size, and the two samples that
are read show memory and disk, not a useful Fisher.

The limit is a memory cgroup (v2 or v1; needs root), in which files that the kernel can drop don't count against us but
everything that we hold does; without the right to make one it is RLIMIT_DATA, which counts all private memory.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cgroups
import checkpoints

from fisherkit.options import parse_bytes

INTERMEDIATE = 11 / 4  # of the hidden size
_SAMPLE_SECONDS = 0.02

SMALL = ("--group-size", "2", "--max-length", "64")


def main() -> None:
    """Make the checkpoints, run the commands under the limit, say what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--command", choices=("extract", "score"), default="extract", help="where there is no --size")
    parser.add_argument("--size", help="of the checkpoint; every command takes its turn")
    parser.add_argument("--blocks", type=int, default=48, help="where --size does not say")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--samples", type=int, help="16 for extract alone, 2 for every command")
    parser.add_argument("--folder", help="keep the checkpoints here (a temporary folder otherwise)")
    options = parser.parse_args()
    limit = parse_bytes("memory", options.memory)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-limit-"))
    folder.mkdir(parents=True, exist_ok=True)
    blocks = options.blocks
    if options.size:
        blocks = max(1, round(parse_bytes("size", options.size) / (2 * _weights(options.hidden))))
    try:
        model = _make(folder, blocks, options.hidden)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        samples = options.samples or (2 if options.size else 16)
        prompts = checkpoints.prompts(folder / "prompts.jsonl", samples=samples, tokens=64)
        print(
            f"{model.name}: {size / 1e9:.2f} GB of weights, {samples} samples of 64 tokens, --group-size 2", flush=True
        )
        fisher = folder / "limit.pt"
        score = ["score", model, "--prompts", prompts, "--samples", folder / "rows.jsonl", *SMALL]
        if options.command == "score":
            _run(score, folder / "rows.jsonl", limit)
            return
        _run(["extract", model, prompts, "-o", fisher, *SMALL], fisher, limit)
        if options.size:
            _go_on(model, fisher, limit)
            _run(score, folder / "rows.jsonl", limit)
    finally:
        if not options.folder:
            shutil.rmtree(folder)


def _go_on(model: Path, fisher: Path, limit: int) -> None:
    """Run the commands that follow a Fisher; each deletes what none after it reads."""
    folder, out = model.parent, model.parent / "out"
    mask = folder / "mask.safetensors"
    _run(["mask", fisher, "-o", mask, "--preset", "fggm"], mask, limit)
    fisher.unlink()
    tuned = folder / "tuned"
    if not tuned.is_dir():
        code = f"from pathlib import Path; import pairs; pairs.tune(Path({str(model)!r}), Path({str(tuned)!r}))"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    _run(["fapm", model, tuned, out], out, limit)
    shutil.rmtree(out)
    _run(["merge", model, tuned, out, "--mask", mask], out, limit)
    shutil.rmtree(out)
    mask.unlink()


def _weights(hidden: int) -> int:
    """Return the weights of one block."""
    return 4 * hidden**2 + 3 * hidden * int(INTERMEDIATE * hidden)


def _make(folder: Path, blocks: int, hidden: int) -> Path:
    name = f"llama-{blocks}x{hidden}-bfloat16"
    return checkpoints.make(
        folder / name, blocks=blocks, hidden=hidden, intermediate=int(INTERMEDIATE * hidden), dtype="bfloat16"
    )


def _run(words: list[object], out: Path, limit: int) -> None:
    """Run one command under the limit, and say what it took and wrote."""
    command = [sys.executable, "-m", "fisherkit", *map(str, words), "--force", "-q"]
    started = time.monotonic()
    with cgroups.limited(limit) as enter:
        how = "a memory cgroup" if enter is not None else "RLIMIT_DATA"
        peak = _wait(command, enter or (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))))
    files = out.glob("*.safetensors") if out.is_dir() else [out]
    print(
        f"{words[0]}: finished in {time.monotonic() - started:.0f} s under {how} of {limit / 1e9:.1f} GB; peak "
        f"{peak / 1e9:.2f} GB without pages of files; wrote {sum(file.stat().st_size for file in files) / 1e9:.2f} GB",
        flush=True,
    )


def _wait(command: list[str], enter: Callable[[], object]) -> int:
    """Run a command to its end; the most bytes it held, pages of files left out."""
    process = subprocess.Popen(command, preexec_fn=enter, stdout=subprocess.DEVNULL)  # noqa: PLW1509 - no thread yet
    peaks, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            peaks[0] = max(peaks[0], _private(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    status = process.wait()
    stop.set()
    sampler.join()
    if status:
        sys.exit(f"{command[3]} ended with {status}")
    return peaks[0]


def _private(pid: int) -> int:
    """Return the bytes of a process that are no pages of files."""
    try:
        _size, resident, files, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return 0
    return (resident - files) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
