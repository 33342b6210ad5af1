"""score against transformers with the whole model in memory: time, peak memory, and that both find the same losses.

    python benchmarks/score.py --blocks 16 --hidden 1024

Each side runs in a process of its own on the same checkpoint and the same prompts, in turn, several times; the fastest
of each is what the machine's other work disturbed least. Imports are left out of time and memory.

stream     fisherkit.score, from the shards to the report
resident   the script that people write: from_pretrained, batches of the same size, cross_entropy of all logits; its
           time is told with and without the loading of the model

How much memory a large vocabulary takes (261,888 more rows of embedding and head are a part of both sides' weights):

    python benchmarks/score.py --blocks 2 --hidden 512 --vocabulary 262144
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ("stream", "resident")


def main() -> None:
    """Make the checkpoint, run each side in turn, print both and how they compare."""
    options = _options()
    if options.side:
        print(json.dumps(_side(options)))
        return
    import checkpoints
    import torch

    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"llama-{options.blocks}x{options.hidden}-{options.vocabulary}-{options.dtype}"
    checkpoints.make(
        folder / name,
        blocks=options.blocks,
        hidden=options.hidden,
        intermediate=11 * options.hidden // 4,
        dtype=options.dtype,
        vocabulary=options.vocabulary,
    )
    checkpoints.prompts(folder / "prompts.jsonl", samples=options.samples, tokens=options.tokens)
    size = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
    print(
        f"{name}: {size / 1e6:,.0f} MB of weights, {options.samples} samples of {options.tokens} tokens, batches of "
        f"{options.batch_tokens}, group size {options.group_size}, {torch.get_num_threads()} threads"
    )
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.turns):
        for side, done in runs.items():
            done.append(_run(options, side, folder, name))
    found = {side: min(done, key=lambda run: run["seconds"]) for side, done in runs.items()}
    for side, run in found.items():
        loaded = f", {run['seconds'] - run['loading']:6.1f} s without loading" if run["loading"] else ""
        print(
            f"{side:9} {run['seconds']:6.1f} s {run['cpu_seconds']:7.1f} CPU-s   peak {run['peak_mb']:6,.0f} MB over "
            f"{run['base_mb']:,.0f}{loaded}",
            flush=True,
        )
    stream, resident = found["stream"], found["resident"]
    forward = resident["seconds"] - resident["loading"]
    print(
        f"stream against resident: speed x{resident['seconds'] / stream['seconds']:.2f}, against its forward alone "
        f"x{forward / stream['seconds']:.2f}; memory {stream['peak_mb'] / resident['peak_mb']:.2f}; losses "
        f"{stream['loss']:.6f} and {resident['loss']:.6f}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", help="keep checkpoints here (a temporary folder otherwise)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(options: argparse.Namespace, side: str, folder: Path, name: str) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--side", side, "--model", name, "--folder", str(folder)]
    for key in ("tokens", "group_size", "batch_tokens"):
        arguments += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# One side, in its own process


def _side(options: argparse.Namespace) -> dict[str, float]:
    import transformers

    from fisherkit.methods.score import score as _  # imports are no side's merit  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    model, prompts = Path(options.folder) / options.model, Path(options.folder) / "prompts.jsonl"
    base, started, cpu = _peak_mb(), time.monotonic(), time.process_time()
    loss, loading = (_stream if options.side == "stream" else _resident)(model, prompts, options)
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "loading": loading,
        "loss": loss,
        "peak_mb": _peak_mb() - base,
        "base_mb": base,
    }


def _stream(model: Path, prompts: Path, options: argparse.Namespace) -> tuple[float, float]:
    import fisherkit

    choice = fisherkit.ScoreOptions(
        max_length=options.tokens, limit=None, group_size=options.group_size, batch_tokens=options.batch_tokens
    )
    report = fisherkit.score(model, {"all": prompts}, choice)
    return report.checkpoints[0].sets["all"].loss, 0.0


def _resident(path: Path, prompts: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Return the loss, and the seconds that it took to load the model."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    loading = time.monotonic() - started
    texts = [json.loads(line)["text"] for line in prompts.read_text().splitlines()]
    ids = tokenizer(texts, return_tensors="pt", truncation=True, max_length=options.tokens).input_ids
    total = 0.0
    with torch.no_grad():
        for batch in ids.split(options.batch_tokens // options.tokens):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return total / ids[:, 1:].numel(), loading


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
