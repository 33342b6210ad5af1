"""Does it help? A small language model learns new tasks, one or several after the other, with and without protection.

    python -m benchmarks.forgetting quick                    a quarter of an hour on 2 cores
    python -m benchmarks.forgetting full --passes 1          every draw once, each on its own base, then sequences
    python -m benchmarks.forgetting full --minutes 100       several such runs; each goes on where the last one was
    python -m benchmarks.forgetting quick --estimate         what is left, and about how long it takes on this machine
    python -m benchmarks.forgetting quick --seeds 20-24 --bases 3-5     the same on other draws and other bases
    python -m benchmarks.forgetting gpu                      a model of 100 million weights, on one GPU
    python -m benchmarks.forgetting gpu --model org/name --rate 1e-5

Run it from the repository's root with the package installed. Every run is a line of ``<size>.jsonl``, and none is made
twice. At the end RESULTS.md and the curves beside it are written anew from all lines there. Everything goes to
``benchmarks/forgetting/work``; with ``--out benchmarks/forgetting`` the published results are gone on with.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.forgetting import estimate, report
from benchmarks.forgetting.runs import Bench
from benchmarks.forgetting.sizes import SIZES, Size
from fisherkit.errors import FisherkitError

_HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Do what is left, write the results; 1 if runs are left."""
    options = _options(arguments)
    size = _size(options)
    results = options.out / f"{size.name}.jsonl"
    bench = Bench(options.work or _HERE / "work" / size.name, size, results, options.model)
    workers = options.workers or (1 if size.device.startswith("cuda") else os.cpu_count() or 1)
    if options.estimate:
        _say(estimate.estimate(bench, workers))
        return 0
    left = 0
    if not options.report_only:
        until = time.monotonic() + 60 * options.minutes
        left = bench.do_all(workers=workers, threads=1, until=until, say=_say)
    report.write(options.out, size, results, left=left)
    _say(f"{options.out / 'RESULTS.md'}: written" + (f"; {left} runs are left, start it again" if left else ""))
    return 1 if left else 0


def _size(options: argparse.Namespace) -> Size:
    """Return the size as asked for; what changes the numbers changes the name."""
    size = SIZES[options.size]
    if options.device:
        size = replace(size, device=options.device)
    if options.model:
        size = replace(size, bases=(0,), name=f"{size.name}-{Path(options.model).name}")
    if options.rate:
        course = replace(size.course, rate=options.rate)
        size = replace(size, course=course, name=f"{size.name}-{options.rate:g}")
    if options.bases:
        size = replace(size, bases=options.bases, name=f"{size.name}-bases{options.bases[0]}-{options.bases[-1]}")
    if options.passes:
        size = replace(size, passes=options.passes)
    if options.seeds:
        size = replace(size, seeds=options.seeds, name=f"{size.name}-seeds{options.seeds[0]}-{options.seeds[-1]}")
    return replace(size, passes=min(size.passes, len(size.bases)))  # a further one would make the same runs


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--model", help="a checkpoint or org/name to take as base, in place of those trained here")
    parser.add_argument(
        "--rate", type=_positive, help="learning rate of plain fine-tuning; a real model wants about 1e-5"
    )
    parser.add_argument("--out", type=Path, default=_HERE / "work", help="folder of RESULTS.md, curves and lines")
    parser.add_argument("--work", type=Path, help="folder of models and masks, kept between runs")
    parser.add_argument("--seeds", type=_numbers, help="draws of the new tasks, such as 20-24")
    parser.add_argument("--bases", type=_numbers, help="base models, such as 3-5, each trained from a seed of its own")
    parser.add_argument("--passes", type=_at_least_one, help="times that every draw is made, each on another base")
    parser.add_argument("--workers", type=_at_least_one, help="processes; one per core otherwise")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    parser.add_argument("--device", type=_device, help="cpu, cuda")
    parser.add_argument("--estimate", action="store_true", help="only time a few runs and say how long the rest takes")
    parser.add_argument("--report-only", action="store_true", help="only write RESULTS.md from the lines there are")
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    """Read ``3`` or ``20-24``."""
    first, _, last = text.partition("-")
    found = tuple(range(int(first), int(last or first) + 1))
    if not found:
        raise argparse.ArgumentTypeError("is empty: the first number is the smaller one")
    return found


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
