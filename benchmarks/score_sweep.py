"""A sweep of fapm that scores five densities in memory, against writing five checkpoints and scoring or loading them.

    python benchmarks/score_sweep.py         a pair of 309 M weights in bfloat16 (619 MB a side)
    python benchmarks/score_sweep.py --blocks 48 --hidden 2048 --intermediate 5632     2.5 G weights (40 GB of disk)

Every side is made of fresh processes, their starts included, on files that are in memory.

sweep      fisherkit fapm BASE FT --sweep 0.1,0.3,0.5,0.7,0.9 --prompts old=.. --prompts new=..; BASE and FT as well
write      fisherkit fapm BASE FT OUT --sparsity S, five times; each output is synced to the disk
score      fisherkit score BASE FT and the five, on the same prompts
load       the script that people write, once for each of the seven: from_pretrained, the loss of every prompt

What a sweep saves is writing and reading; the forward passes are the same. So prompts are few by default, and the sum
is also told without them: ``score`` of the seven is the forward passes and one reading of each.

The machine may be shared: CPU seconds are told beside wall time. The losses of both ways are compared, bit for bit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from processes import Took, measure

SPARSITIES = (0.1, 0.3, 0.5, 0.7, 0.9)
FISHERKIT = [sys.executable, "-m", "fisherkit"]


@dataclass
class Sum:
    """Several processes, one after the other."""

    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0

    def add(self, took: Took) -> None:
        """Add one process."""
        self.seconds, self.cpu, self.peak = self.seconds + took.seconds, self.cpu + took.cpu, max(self.peak, took.peak)


def main() -> None:
    """Make the pair and the prompts, run every side, print them and how they compare."""
    options = _options()
    if options.load:
        print(json.dumps(_losses(Path(options.load), Path(options.folder), options.tokens)))
        return
    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-sweep-"))
    try:
        _compare(folder, options)
    finally:
        if not options.folder:
            shutil.rmtree(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--samples", type=int, default=4, help="of each of two sets")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a calm moment, per side")
    parser.add_argument("--folder", help="keep checkpoints here (a temporary folder otherwise)")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(folder: Path, options: argparse.Namespace) -> None:
    made = _in_another_process(folder, options)
    base, tuned = folder / "base", folder / "tuned"
    sets = [word for name in ("old", "new") for word in ("--prompts", f"{name}={folder / name}.jsonl")]
    sets += ["--limit", "0", "--max-length", str(options.tokens), "-q"]
    print(
        f"{made['weights'] / 1e6:,.0f} M weights, {made['bytes'] / 1e6:,.0f} MB a side; 2 x {options.samples} samples "
        f"of {options.tokens} tokens; {os.cpu_count()} cores",
        flush=True,
    )
    sweep, write, score, load = Sum(), Sum(), Sum(), Sum()
    outs = {sparsity: folder / f"out-{sparsity}" for sparsity in SPARSITIES}
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)
    for name in ("swept.json", "swept.html"):
        (folder / name).unlink(missing_ok=True)
    listed = ",".join(map(str, SPARSITIES))
    report = ["--sweep", listed, "--report", str(folder / "swept.json")]
    sweep.add(measure([*FISHERKIT, "fapm", str(base), str(tuned), *report, *sets], patience=options.patience))
    for sparsity, out in outs.items():
        words = ["fapm", str(base), str(tuned), str(out), "--sparsity", str(sparsity), "-q"]
        write.add(measure([*FISHERKIT, *words], patience=options.patience))
    models = [str(path) for path in (base, tuned, *outs.values())]
    score.add(measure([*FISHERKIT, "score", *models, *sets], patience=options.patience))
    for model in models:
        words = ["--load", model, "--folder", str(folder), "--tokens", str(options.tokens)]
        load.add(measure([sys.executable, __file__, *words], patience=options.patience))
    _check(folder, models, sets)
    _print(sweep, write, score, load)


def _in_another_process(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Make pair and prompts where memory is nobody's base line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (
        "import sys, json, pathlib, pairs, checkpoints;"
        "f = pathlib.Path(sys.argv[1]); n = list(map(int, sys.argv[2:]));"
        "made = pairs.make(f, *n[:3], 'bfloat16');"
        "[checkpoints.prompts(f / f'{s}.jsonl', samples=n[3], tokens=n[4]) for s in ('old', 'new')];"
        "print(json.dumps(made))"
    )
    sizes = (options.blocks, options.hidden, options.intermediate, options.samples, options.tokens)
    command = [sys.executable, "-c", lines, str(folder), *map(str, sizes)]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _check(folder: Path, models: list[str], sets: list[str]) -> None:
    """Stop unless the sweep's losses are those of the written checkpoints."""
    words = [*FISHERKIT, "score", *models, *sets, "--json"]
    written = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    swept = json.loads((folder / "swept.json").read_bytes())
    ours, theirs = (
        [{name: one["sets"][name]["loss"] for name in one["sets"]} for one in found["checkpoints"]]
        for found in (swept, written)
    )
    if ours != theirs:
        sys.exit(f"the sweep's losses are not those of what was written:\n{ours}\n{theirs}")
    print("losses of the sweep and of the written checkpoints: equal, bit for bit")


def _print(sweep: Sum, write: Sum, score: Sum, load: Sum) -> None:
    sides = {"sweep": sweep, "write": write, "score": score, "load": load}
    for name, side in sides.items():
        print(f"{name:6}{side.seconds:8.1f} s{side.cpu:9.1f} CPU-s   peak {side.peak / 1e6:7,.0f} MB")
    for name, second in (("score", score), ("load", load)):
        print(
            f"write and {name}, against the sweep: x{(write.seconds + second.seconds) / sweep.seconds:.1f} in time, "
            f"x{(write.cpu + second.cpu) / sweep.cpu:.1f} in CPU seconds"
        )
    beside = sweep.seconds - score.seconds
    print(f"beside the forward passes (without `score`): the sweep {beside:.1f} s, writing {write.seconds:.1f} s")


def _losses(model: Path, folder: Path, tokens: int) -> dict[str, float]:
    """The loss on both sets, with the whole model in memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    found = {}
    for name in ("old", "new"):
        texts = [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        ids = tokenizer(texts, return_tensors="pt", truncation=True, max_length=tokens).input_ids
        with torch.no_grad():
            found[name] = float(loaded(input_ids=ids, labels=ids, use_cache=False).loss)
    return found


if __name__ == "__main__":
    main()
