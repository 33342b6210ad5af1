"""extract against the published recipe and against the plain loop: time, peak memory, and the machine's GEMM rate.

    python benchmarks/extract.py --blocks 48 --dtype float32

Each side runs in a process of its own on the same checkpoint and the same prompts, from loading the model to the
written file; imports are left out of time and memory on both sides. The machine's GEMM rate is measured in each of
these processes right before and right after, because the machines this runs on are shared and noisy.

stream   fisherkit.extract
recipe   the published recipe: whole model resident, 8 layers unfrozen at a time, one pass for each 8 layers
loop     the plain 40-line script: everything resident, every parameter unfrozen, one pass, grad**2 added up

What --statistics activations costs beside the Fisher, in time and memory, both sides several times in turn:

    python benchmarks/extract.py --activations 3 --blocks 16

A 16-bit checkpoint computed in its own type and in float32, both several times in turn, and which one auto takes:

    python benchmarks/extract.py --widened 3 --blocks 8 --dtype bfloat16
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("stream", "recipe", "loop")
WITH = "stream with activations"
WIDENED = "stream in float32"


def main() -> None:
    """Make the checkpoint, run each side, print one table."""
    options = _options()
    if options.side:
        print(json.dumps(_side(options)))
        return
    import checkpoints
    import torch

    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"llama-{options.blocks}x{options.hidden}-{options.dtype}"
    checkpoints.make(
        folder / name,
        blocks=options.blocks,
        hidden=options.hidden,
        intermediate=options.intermediate,
        dtype=options.dtype,
    )
    checkpoints.prompts(folder / "prompts.jsonl", samples=options.samples, tokens=options.tokens)
    weights = 4 * options.hidden**2 + 3 * options.hidden * options.intermediate
    print(
        f"{name}: {options.blocks * weights / 1e6:,.0f} M weights in blocks, {options.samples} samples of "
        f"{options.tokens} tokens, group size {options.group_size}, {torch.get_num_threads()} threads"
    )
    for other, times in ((WITH, options.activations), (WIDENED, options.widened)):
        if times:
            _both(options, other, times, folder, name)
            return
    found = {}
    for side in options.sides.split(","):
        found[side] = _run(options, side, folder, name)
        _print(side, found[side], options.blocks * weights * options.samples * options.tokens)
    _compare(found, folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--activations", type=int, default=0, metavar="TIMES", help="compare with and without them")
    parser.add_argument("--widened", type=int, default=0, metavar="TIMES", help="compare with computing in float32")
    parser.add_argument("--folder", help="keep checkpoints here (a temporary folder otherwise)")
    parser.add_argument("--side", choices=(*SIDES, WITH, WIDENED), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def _both(options: argparse.Namespace, other: str, times: int, folder: Path, name: str) -> None:
    """Both sides in turn; the least of each is what the machine's other work disturbed least."""
    weights = 4 * options.hidden**2 + 3 * options.hidden * options.intermediate
    token_weights = options.blocks * weights * options.samples * options.tokens
    found: dict[str, list[dict[str, float]]] = {"stream": [], other: []}
    for _ in range(times):
        for side, runs in found.items():
            runs.append(_run(options, side, folder, name))
            _print(side, runs[-1], token_weights)
    seconds, cpu, peak = (
        {side: min(run[key] for run in runs) for side, runs in found.items()}
        for key in ("seconds", "cpu_seconds", "peak_mb")
    )
    print(
        f"{other} against stream: time x{seconds[other] / seconds['stream']:.2f}, "
        f"CPU time x{cpu[other] / cpu['stream']:.2f}, {peak[other] - peak['stream']:+,.0f} MB"
    )
    if other == WIDENED:
        import torch

        from fisherkit.engine.model.compute_dtype import ProbeShape, choose_compute_dtype, slowdown

        dtype, shape = getattr(torch, options.dtype), ProbeShape(options.tokens, options.hidden, options.intermediate)
        chosen, _ = choose_compute_dtype(dtype, torch.device("cpu"), shape)
        print(
            f"--dtype auto: the probe finds {options.dtype} {slowdown(dtype, shape):.2f} times as slow, takes {chosen}"
        )


def _run(options: argparse.Namespace, side: str, folder: Path, name: str) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--side", side, "--model", name, "--folder", str(folder)]
    for key in ("blocks", "samples", "tokens", "group_size", "batch_tokens", "dtype"):
        arguments += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _print(side: str, found: dict[str, float], token_weights: int) -> None:
    four_f = 4 * 2 * token_weights / found["gemm"]
    print(
        f"{side:{8 if side in SIDES else len(WITH)}} {found['seconds']:8.1f} s {found['cpu_seconds']:8.1f} CPU-s   "
        f"peak {found['peak_mb']:6,.0f} MB over {found['base_mb']:,.0f}   "
        f"4F at {found['gemm'] / 1e9:,.0f} GFLOP/s: {four_f:6.1f} s ({four_f / found['seconds']:.0%})",
        flush=True,
    )


def _compare(found: dict[str, dict[str, float]], folder: Path) -> None:
    import torch

    sums = {side: torch.load(folder / f"{side}.pt", mmap=True) for side in found}
    for side in list(found)[1:]:
        first = next(iter(found))
        worst = max(
            float((sums[first][n].double() - v.double()).norm() / v.double().norm()) for n, v in sums[side].items()
        )
        print(
            f"{first} against {side}: time x{found[side]['seconds'] / found[first]['seconds']:.2f}, memory "
            f"{found[first]['peak_mb'] / found[side]['peak_mb']:.2f}, worst relative difference of a tensor {worst:.1e}"
        )


# One side, in its own process


def _side(options: argparse.Namespace) -> dict[str, float]:
    import torch
    import transformers

    from fisherkit.methods.extract import measure  # imports are no side's merit

    transformers.utils.logging.disable_progress_bar()
    folder = Path(options.folder)
    out = folder / f"{options.side.replace(' ', '-')}.pt"
    for old in folder.glob(f"{out.stem}.*"):
        old.unlink() if old.is_file() else None
    dtype = getattr(torch, options.dtype)
    before = _gemm_rate(dtype)
    base = _peak_mb()
    started, cpu = time.monotonic(), time.process_time()
    if options.side in ("stream", WITH, WIDENED):
        from fisherkit.options import ExtractOptions

        choice = ExtractOptions(
            max_length=options.tokens,
            limit=None,
            group_size=options.group_size,
            batch_tokens=options.batch_tokens,
            store="fp32",
            engine="stream",
            statistics="activations" if options.side == WITH else "fisher",
            dtype="float32" if options.side == WIDENED else options.dtype,
        )
        measure.extract(folder / options.model, folder / "prompts.jsonl", out, choice)
    else:
        group = 8 if options.side == "recipe" else 10**6
        _script(folder / options.model, folder / "prompts.jsonl", out, options.tokens, group)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    peak = _peak_mb()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": peak - base,
        "base_mb": base,
        "gemm": (before + _gemm_rate(dtype)) / 2,
    }


def _script(model_path: Path, prompts: Path, out: Path, tokens: int, group: int, device: Any = "cpu") -> None:
    """Script as people write it themselves, with the square taken per sample."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").to(device).eval()
    texts = [json.loads(line)["text"] for line in prompts.read_text().splitlines()]
    fisher = {}
    layers = model.model.layers
    model.requires_grad_(False)
    for start in range(0, len(layers), group):
        numbered = range(start, min(start + group, len(layers)))
        targets = {
            f"model.layers.{n}.{name}": p for n in numbered for name, p in layers[n].named_parameters() if p.ndim == 2
        }
        sums = {name: torch.zeros(p.shape, device=device) for name, p in targets.items()}
        for parameter in targets.values():
            parameter.requires_grad_(True)
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens).input_ids.to(device)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for name, parameter in targets.items():
                sums[name] += parameter.grad.float() ** 2
                parameter.grad = None
        for name, parameter in targets.items():
            parameter.requires_grad_(False)
            fisher[name] = (sums[name] / len(texts)).cpu()
    torch.save(fisher, out)


def _gemm_rate(dtype: "torch.dtype") -> float:  # noqa: F821
    """FLOP/s of square matrices of 2048, the best of five."""
    import torch

    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
