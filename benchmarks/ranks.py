"""extract in several processes against one: time, bytes of sums sent, and reads of the weights.

    python benchmarks/ranks.py --blocks 16

One process with two threads, one with one thread, and two gloo ranks with one thread each, on the same checkpoint and
the same prompts, in turn and several times, because the machines this runs on are shared and noisy. Imports are left
out of the time. A ring's reduce-scatter of B bytes over n ranks sends (n - 1)/n B from each.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = {"1 process, 2 threads": (1, 2), "1 process, 1 thread": (1, 1), "2 ranks, 1 thread each": (2, 1)}


def main() -> None:
    """Make the checkpoint, measure each way in turn, print one table."""
    options = _options()
    if options.side:
        _measure(options)
        return
    import checkpoints

    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    size = {"blocks": options.blocks, "hidden": options.hidden, "intermediate": options.intermediate}
    model = checkpoints.make(folder / f"llama-{options.blocks}x{options.hidden}", **size, dtype="float32")
    prompts = checkpoints.prompts(folder / "prompts.jsonl", samples=options.samples, tokens=options.tokens)
    weights = options.blocks * (4 * options.hidden**2 + 3 * options.hidden * options.intermediate)
    print(
        f"{model.name}: {weights / 1e6:,.0f} M weights in blocks, {options.samples} samples of {options.tokens} "
        f"tokens, group size {options.group_size}"
    )
    found: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for _ in range(options.turns):
        for way, (ranks, threads) in WAYS.items():
            found[way].append(_run(options, model, prompts, folder, ranks, threads))
    _show(found, 4 * weights, sum(file.stat().st_size for file in model.glob("*.safetensors")), options)


def _run(
    options: argparse.Namespace, model: Path, prompts: Path, folder: Path, ranks: int, threads: int
) -> list[dict[str, Any]]:
    """Run one way, each rank in a process of its own; return what each reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, __file__, "--side", str(model), str(prompts), str(folder / "fisher.safetensors")]
    words += ["--group-size", str(options.group_size), "--tokens", str(options.tokens)]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | place))
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _measure(options: argparse.Namespace) -> None:
    """Measure once in this process, and print seconds and bytes as JSON."""
    import torch

    import fisherkit
    from fisherkit.engine.ranks.group import RankGroup
    from fisherkit.methods.extract import measure  # noqa: F401 - imported before the clock starts

    groups: list[RankGroup] = []
    enter = RankGroup.__enter__
    RankGroup.__enter__ = lambda self: (groups.append(self), enter(self))[1]  # type: ignore[method-assign]
    model, prompts, out = options.side
    how = fisherkit.ExtractOptions(
        force=True, group_size=options.group_size, max_length=options.tokens, batch_tokens=8 * options.tokens, limit=0
    )
    torch.ones(8, 8) @ torch.ones(8, 8)
    began, cpu = time.monotonic(), time.process_time()
    fisherkit.extract(model, prompts, out, how, distributed=True)
    seconds = {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu}
    counts = {"sent": groups[0].sent_bytes, "read": groups[0].read_bytes} if groups else {}
    print(json.dumps(seconds | counts))


def _show(
    found: dict[str, list[list[dict[str, Any]]]], sums: int, checkpoint: int, options: argparse.Namespace
) -> None:
    best = {way: min(runs, key=lambda run: run[0]["seconds"]) for way, runs in found.items()}
    first = best[next(iter(best))][0]["seconds"]
    for way, run in best.items():
        cpu = sum(rank["cpu"] for rank in run)
        print(f"{way:24}{run[0]['seconds']:8.1f} s{cpu:8.1f} CPU-s   speed {first / run[0]['seconds']:.2f}")
    for run in best.values():
        if len(run) > 1:
            groups = -(-options.blocks // options.group_size)
            ring = (len(run) - 1) / len(run) * sums / groups
            sent = "  ".join(f"{rank['sent'] / groups / 1e6:,.1f}" for rank in run)
            print(
                f"  MB of sums sent for each group by each rank: {sent}; by a ring's reduce-scatter {ring / 1e6:,.1f}"
            )
            read = sum(rank["read"] for rank in run)
            parts = "  ".join(f"{rank['read'] / 1e6:,.0f}" for rank in run)
            times = f"{read / checkpoint:.2f} times the checkpoint's {checkpoint / 1e6:,.0f}"
            print(f"  MB read by each rank: {parts}; together {times}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", help="for the checkpoint; a temporary one by default")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
