"""fapm against mergekit's ties and della on one pair of checkpoints, and against reading and copying the files.

    python benchmarks/fapm.py                two pairs of 85 M weights: float32 (343 MB a side) and bfloat16
    python benchmarks/fapm.py --size 5GB     one pair of 2.5 G weights in bfloat16 (needs 16 GB of disk)
    python benchmarks/fapm.py --quick        a few megabytes, to try it out

Every side is a fresh process, its start included, on files that are in memory; its memory is the peak of all its
processes. A tenth of the delta is kept on every side. mergekit is installed once into an environment of its own
(--venv); nothing of it is imported here.

fapm       fisherkit fapm BASE FT OUT --sparsity 0.9; it syncs its output to the disk, mergekit does not
ties       mergekit-yaml, density 0.1, weight 1, normalize off, in the pair's own type
della      the same, with epsilon 0.05 (it must be below the density)
ties-50M   ties with --out-shard-size 50M, which lowers its memory; by default it holds up to 5 GB of its output

The machine may be shared: sides take turns, each waits for a calm moment, and the fastest turn of each is shown.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cgroups
from processes import Took, evict, measure

OURS = "fapm"
PEERS = ("ties", "della", "ties-50M")
MERGEKIT = "mergekit==0.1.5"
READ, COPY, SYNC, COLD = "read", "copy", "copy and sync", "cold "
LIMIT = 200_000_000  # bytes of a cgroup that fapm is also run in
TORCH = "torch==2.13.0"  # first and pinned, or pip fetches the build for GPUs with it


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama."""

    blocks: int
    hidden: int
    intermediate: int
    dtype: str

    def __str__(self) -> str:
        return f"llama-{self.blocks}x{self.hidden}-{self.dtype}"


SHAPES = {
    "quick": [Shape(4, 256, 704, "bfloat16")],
    "300MB": [Shape(12, 768, 2048, "float32"), Shape(12, 768, 2048, "bfloat16")],
    "5GB": [Shape(48, 2048, 5632, "bfloat16")],
    "5GB-float32": [Shape(24, 2048, 5632, "float32")],
}
DEEPER = 4  # times as many blocks, for memory against size


@dataclass(frozen=True)
class Pair:
    """Two sides on disk."""

    folder: Path
    nbytes: int
    facts: str

    @property
    def base(self) -> Path:
        """Path of the model."""
        return self.folder / "base"

    @property
    def tuned(self) -> Path:
        """Path of the model after its fine-tune."""
        return self.folder / "tuned"

    @property
    def out(self) -> Path:
        """Path that a side writes to."""
        return self.folder / "out"

    @property
    def weights(self) -> list[Path]:
        """All files of weights that are read."""
        return sorted([*self.base.glob("*.safetensors"), *self.tuned.glob("*.safetensors")])


def main() -> None:
    """Make the pairs, let the sides take turns, print one table per pair."""
    options = _options()
    sides = [side for side in options.sides.split(",") if side]
    programs = _programs(Path(options.venv), any(side in PEERS for side in sides))
    folder = Path(options.folder or tempfile.mkdtemp(prefix="fisherkit-fapm-"))
    try:
        for shape in SHAPES[options.size]:
            pair = _make(folder, shape)
            _compare(pair, shape.dtype, sides, programs, options)
        if options.size == "300MB":
            _memory_against_size(folder, SHAPES["300MB"][-1], programs, options.patience)
    finally:
        if not options.folder:
            shutil.rmtree(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="300MB", help="of a side")
    parser.add_argument("--quick", action="store_const", dest="size", const="quick", help="the same as --size quick")
    parser.add_argument("--sides", default=",".join((OURS, *PEERS)), help="which of %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="turns of fapm and of the limits")
    parser.add_argument("--repeat-peers", type=int, default=3, help="turns of mergekit")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for a calm moment, per turn")
    parser.add_argument("--folder", help="keep checkpoints here (a temporary folder otherwise)")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parser.add_argument("--venv", default=Path(cache, "fisherkit-benchmarks", "mergekit"), help="where mergekit is put")
    return parser.parse_args()


# Sides


def _programs(environment: Path, peers: bool) -> dict[str, list[str]]:
    """Return the programs to start; each has been started once, so that bytecode and libraries are in place."""
    found = {OURS: [sys.executable, "-m", "fisherkit"]}
    if peers:
        found["mergekit"] = [str(_install(environment) / "bin" / "mergekit-yaml")]
    for name, program in found.items():
        measure([*program, "--help"])
        took = measure([*program, "--help"], patience=30)
        print(f"{name} --help: {took.seconds:.2f} s, {took.peak / 1e6:.0f} MB", flush=True)
    return found


def _install(environment: Path) -> Path:
    """An environment with mergekit in it."""
    if (environment / "ready").exists():
        return environment
    print(f"installing {MERGEKIT} into {environment} ...", flush=True)
    venv.create(environment, with_pip=True, clear=True)
    constraints = environment / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    for wanted in (TORCH, MERGEKIT):
        command = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(constraints), wanted]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{wanted} could not be installed; --sides fapm does without")
    (environment / "ready").touch()
    return environment


def _command(side: str, pair: Pair, dtype: str, programs: dict[str, list[str]]) -> list[str]:
    if side == OURS:
        return [*programs[OURS], "fapm", str(pair.base), str(pair.tuned), str(pair.out), "--sparsity", "0.9", "-q"]
    method, _, shards = side.partition("-")
    parameters = {"density": 0.1, "weight": 1.0} | ({"epsilon": 0.05} if method == "della" else {})
    recipe = {
        "merge_method": method,
        "base_model": str(pair.base),
        "models": [{"model": str(pair.tuned), "parameters": parameters}],
        "parameters": {"normalize": False},
        "dtype": dtype,
    }
    file = pair.folder / f"{side}.yml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    flags = ["--no-copy-tokenizer", "--random-seed", "0", "--quiet"]
    return [*programs["mergekit"], str(file), str(pair.out), *flags, *(["--out-shard-size", shards] if shards else [])]


# Pairs


def _make(folder: Path, shape: Shape) -> Pair:
    place = folder / str(shape)
    place.mkdir(parents=True, exist_ok=True)
    dimensions = [str(shape.blocks), str(shape.hidden), str(shape.intermediate), shape.dtype]
    found = _pairs([str(place), *dimensions])
    return Pair(
        place,
        found["bytes"],
        f"{shape}: {found['weights'] / 1e6:,.0f} M weights, {found['bytes'] / 1e6:,.0f} MB a side, "
        f"largest tensor {found['largest'] / 1e6:.1f} MB",
    )


def _pairs(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("pairs.py")), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# Turns


def _compare(
    pair: Pair, dtype: str, sides: Sequence[str], programs: dict[str, list[str]], options: argparse.Namespace
) -> None:
    print(f"\n{pair.facts}, {os.cpu_count()} cores", flush=True)
    commands = {side: _command(side, pair, dtype, programs) for side in sides} | _shell(pair)
    measure(commands[READ])
    best: dict[str, Took] = {}
    shares: dict[str, dict[str, float]] = {}
    for turn in range(max(options.repeat, options.repeat_peers)):
        for name, command in commands.items():
            if turn < (options.repeat_peers if name in PEERS else options.repeat):
                best[name] = _better(best.get(name), _turn(pair, name, command, options.patience))
                if name in sides and turn == 0:
                    shares[name] = _pairs(["--check", str(pair.base), str(pair.tuned), str(pair.out)])
    for cold in [COLD + name for name in (OURS, READ, SYNC) if OURS in sides] * options.repeat:
        took = _turn(pair, cold, commands[cold.removeprefix(COLD)], options.patience)
        best[cold] = _better(best.get(cold), took)
    _print_sides(best, sides, shares)
    if OURS in sides:
        _print_limits(pair, best)
        _print_within(pair, commands[OURS], options)
    shutil.rmtree(pair.out, ignore_errors=True)


def _shell(pair: Pair) -> dict[str, list[str]]:
    """Measure the least that a pass over both sides can take."""
    read = f"cat {pair.base}/*.safetensors {pair.tuned}/*.safetensors > /dev/null"
    copy = f"{read}; cp -r {pair.tuned} {pair.out}"
    lines = {READ: read, COPY: copy, SYNC: f"{copy}; sync {pair.out}/*"}
    return {name: ["sh", "-c", line] for name, line in lines.items()}


def _turn(pair: Pair, name: str, command: Sequence[str], patience: float) -> Took:
    shutil.rmtree(pair.out, ignore_errors=True)
    if name.startswith(COLD):
        evict(pair.weights)
    took = measure(command, patience=patience)
    print(f"  {name}: {took.seconds:.2f} s, others {took.others:.0%}", file=sys.stderr, flush=True)
    return took


def _better(one: Took | None, other: Took) -> Took:
    """Return the faster of two turns, with the higher of their peaks."""
    if one is None:
        return other
    fast = min(one, other, key=lambda took: took.seconds)
    return replace(fast, peak=max(one.peak, other.peak), private=max(one.private, other.private))


# What is printed


def _print_sides(best: dict[str, Took], sides: Sequence[str], shares: dict[str, dict[str, float]]) -> None:
    first = best[sides[0]]
    print("side           seconds           CPU-s         peak MB         no files  others  changed  on neither side")
    for side in sides:
        took, share = best[side], shares[side]
        print(
            f"{side:9}{took.seconds:9.2f} x{took.seconds / first.seconds:<6.1f}"
            f"{took.cpu:8.2f} x{took.cpu / first.cpu:<6.1f}{took.peak / 1e6:7,.0f} x{took.peak / first.peak:<6.1f}"
            f"{took.private / 1e6:9,.0f}{took.others:8.0%}{share['changed']:9.2%}{share['strange']:10.2%}",
            flush=True,
        )


def _print_limits(pair: Pair, best: dict[str, Took]) -> None:
    """Speed of fapm as a share of plain reading and copying, on warm and on cold files."""
    for cold, theirs in (("", COPY), ("", SYNC), (COLD, SYNC)):
        plain, took = best[cold + theirs].seconds, best[cold + OURS].seconds
        what = (
            f"{'cold' if cold else 'warm'}: cat BASE FT > /dev/null; cp -r FT OUT{'; sync' if theirs == SYNC else ''}"
        )
        print(f"{what:55} {plain:7.2f} s; fapm {took:7.2f} s, {plain / took:.0%} of its speed", flush=True)
    for cold in ("", COLD):
        read, through = (volume * pair.nbytes / 1e6 for volume in (2, 3))
        print(
            f"{'cold' if cold else 'warm'}: reading alone {read / best[cold + READ].seconds:,.0f} MB/s; "
            f"fapm reads and writes {through / best[cold + OURS].seconds:,.0f} MB/s",
            flush=True,
        )


def _print_within(pair: Pair, command: Sequence[str], options: argparse.Namespace) -> None:
    """Time of fapm where the kernel gives it no more than LIMIT bytes, for its memory and for what it writes.

    Inputs that are in memory already are not counted.
    """
    group = cgroups.make_group(LIMIT)
    if group is None:
        print("no cgroup may be made here, so fapm was not run within one")
        return
    inside = ["sh", "-c", f"echo $$ > {shlex.quote(str(group))}/cgroup.procs && exec {shlex.join(command)}"]
    try:
        best = min(_turn(pair, OURS, inside, options.patience).seconds for _ in range(options.repeat))
        found = f"fapm {best:.2f} s"
    except SystemExit as failed:
        found = str(failed.code).splitlines()[0]
    finally:
        group.rmdir()
    print(f"warm, in a cgroup of {LIMIT / 1e6:.0f} MB: {found}", flush=True)


def _memory_against_size(folder: Path, shape: Shape, programs: dict[str, list[str]], patience: float) -> None:
    """Measure memory at the same largest tensor and more of them."""
    print("\npeak memory of fapm against size")
    for one in (shape, replace(shape, blocks=DEEPER * shape.blocks)):
        pair = _make(folder, one)
        took = _turn(pair, OURS, _command(OURS, pair, one.dtype, programs), patience)
        shutil.rmtree(pair.out)
        print(f"{pair.facts}: {took.peak / 1e6:.0f} MB, {took.private / 1e6:.0f} without pages of files", flush=True)


if __name__ == "__main__":
    main()
