"""Does it help? A small language model learns new tasks one after the other, with and without protection.

    python -m benchmarks.forgetting quick          15 minutes on 2 cores
    python -m benchmarks.forgetting full           100 minutes on 2 cores
    python -m benchmarks.forgetting gpu            a model of 100 million weights, on one GPU
    python -m benchmarks.forgetting gpu --model org/name --rate 1e-5

Run it from the repository's root with the package installed. Killed and started again, it goes on where it was: every
run is a line of ``<size>.jsonl``, and none is made twice. At the end RESULTS.md and the curves beside it are written
anew from all lines there. Everything goes to ``benchmarks/forgetting/work``; with ``--out benchmarks/forgetting`` the
published results are gone on with.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.forgetting import model as models
from benchmarks.forgetting import report, runs
from benchmarks.forgetting.sizes import SIZES
from benchmarks.forgetting.world import World
from fisherkit.errors import FisherkitError

_HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Do what is left, write the results; 1 if runs are left."""
    options = _options(arguments)
    size = SIZES[options.size]
    if options.device:
        size = replace(size, device=options.device)
    if options.model:
        size = replace(size, name=f"{size.name}-{Path(options.model).name}")
    if options.rate:
        course = replace(size.course, rate=options.rate)
        size = replace(size, course=course, name=f"{size.name}-{options.rate:g}")
    if options.seeds:
        size = replace(size, seeds=options.seeds)
    work = options.work or _HERE / "work" / size.name
    results = options.out / f"{size.name}.jsonl"
    left = 0
    if not options.report_only:
        world = World(work, size, options.model)
        left = _run(world, results, options)
    report.write(options.out, size, results, left=left)
    _say(f"{options.out / 'RESULTS.md'}: written" + (f"; {left} runs are left, start it again" if left else ""))
    return 1 if left else 0


def _run(world: World, results: Path, options: argparse.Namespace) -> int:
    workers = options.workers or (1 if world.size.device.startswith("cuda") else os.cpu_count() or 1)
    until = time.monotonic() + 60 * options.minutes
    models.be_repeatable(os.cpu_count() or 1)
    started = time.monotonic()
    _say(f"{world.base}: the base, {time.monotonic() - started:.0f} s")
    started = time.monotonic()
    _say(f"{world.fisher}: its Fisher and activations, {time.monotonic() - started:.0f} s")
    return runs.do_all(world, results, workers=workers, threads=1, until=until, say=_say)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--model", help="a checkpoint or org/name to take as base, in place of one trained here")
    parser.add_argument(
        "--rate", type=_positive, help="learning rate of plain fine-tuning; a real model wants about 1e-5"
    )
    parser.add_argument("--out", type=Path, default=_HERE / "work", help="folder of RESULTS.md, curves and lines")
    parser.add_argument("--work", type=Path, help="folder of models and masks, kept between runs")
    parser.add_argument("--seeds", type=_at_least_one, help="in place of the size's own number")
    parser.add_argument("--workers", type=_at_least_one, help="processes; one per core otherwise")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    parser.add_argument("--device", type=_device, help="cpu, cuda")
    parser.add_argument("--report-only", action="store_true", help="only write RESULTS.md from the lines there are")
    return parser.parse_args(arguments)


def _at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _device(text: str) -> str:
    if text != "cpu" and not (text.startswith("cuda") and torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine")
    return text


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FisherkitError, OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
