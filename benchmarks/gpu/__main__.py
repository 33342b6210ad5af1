"""Run everything that needs a GPU, and write the table "On a GPU" of benchmarks/README.md.

    python -m benchmarks.gpu

In turn: the tests marked ``cuda``; the fused kernel against plain torch and the card's rate of matrix products; extract
against the published recipe and the plain loop; blocks of the 31B shape, one at a time, with the share of time that
copies are exposed; a training step under each rule. A part that fails is a line of the table, and the others go on.
Checkpoints with random weights go to ``--folder`` (12 GB). Without a GPU nothing is run, and the table stays as it is.
"""

import argparse
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.gpu import extraction, kernel, table, training
from benchmarks.gpu.card import hardware

ROOT = Path(__file__).parents[2]
README = ROOT / "benchmarks" / "README.md"
PARTS = ("tests", "kernel", "extract", "large", "training")


def main(words: list[str] | None = None) -> int:
    """Run the parts; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of the parts: {','.join(PARTS)}", default=",".join(PARTS))
    parser.add_argument("--folder", type=Path, help="keep checkpoints here (a temporary folder otherwise)")
    parser.add_argument("--table", type=Path, default=README, help="the page whose table is written")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        print(f"benchmarks.gpu: no CUDA device here (torch {torch.__version__}); nothing was run", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory(prefix="fisherkit-gpu-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wanted, sections, failed = options.only.split(","), [], False
        for name, part in parts(device, folder).items():
            if name not in wanted:
                continue
            section, ran = attempt(name, part)
            print("\n".join(section), flush=True)
            sections.append(section)
            failed |= not ran
    today = datetime.now(UTC).date().isoformat()
    table.replace(options.table, table.about(hardware(device), today), sections)
    return int(failed)


def parts(device: torch.device, folder: Path) -> dict[str, Callable[[], list[str]]]:
    """Return the parts by name; each gives lines of Markdown."""
    return {
        "tests": lambda: ["**Tests marked `cuda`**: " + tests()],
        "kernel": lambda: ["**Squared gradients of one weight**", "", *table.rows(kernel.HEADER, kernel.rows(device))],
        "extract": lambda: _extract(device, folder),
        "large": lambda: _large(device, folder),
        "training": lambda: [
            "**A training step** (Llama 8 x 2048, bfloat16, 8,192 tokens, AdamW)",
            "",
            *table.rows(training.HEADER, training.rows(device)),
        ],
    }


def attempt(name: str, part: Callable[[], list[str]]) -> tuple[list[str], bool]:
    """Return the lines of a part and whether it ran; one that fails is told in a line."""
    try:
        return part(), True
    except Exception as error:  # whatever it is, the other parts are worth their time
        traceback.print_exc()
        return [
            f"**{name}** failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        ], False


def tests() -> str:
    """Run the tests marked ``cuda``; return pytest's last line."""
    plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark")  # it warns where it is, and warnings are errors
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", *plugins, "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    return lines[-1] if lines else f"pytest ended with {done.returncode}"


def _extract(device: torch.device, folder: Path) -> list[str]:
    shape = extraction.MANY
    rows = table.rows(extraction.HEADER, extraction.against_scripts(shape, device, folder))
    return [f"**extract** ({shape.words()})", "", *rows]


def _large(device: torch.device, folder: Path) -> list[str]:
    shape = extraction.LARGE
    rows, lines = extraction.large_blocks(shape, device, folder)
    listed = [f"- {line}" for line in lines]
    return [f"**Blocks of the 31B shape** ({shape.words()})", "", *table.rows(extraction.HEADER, rows), "", *listed]


if __name__ == "__main__":
    sys.exit(main())
