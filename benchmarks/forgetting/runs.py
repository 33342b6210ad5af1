"""Runs: what there is to do, doing one, and the file of finished ones, a JSON line each; a line is never made again.

A run is a size, a seed, an order of tasks, a method and a setting. Runs of methods that act on a finished fine-tune
come after those fine-tunes, whose folders are kept for them (and made again if they are gone).
"""

import json
import os
import platform
import random
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.forgetting import model as models
from benchmarks.forgetting import tasks
from benchmarks.forgetting.measures import Line
from benchmarks.forgetting.methods import LEARN, Stage, save
from benchmarks.forgetting.posthoc import POSTHOC, Finished, keep_part
from benchmarks.forgetting.sizes import Size
from benchmarks.forgetting.world import World

UNTUNED = "base"
"""The method of a run that does nothing: what the base is worth."""
_SINGLE = 1


@dataclass(frozen=True)
class Run:
    """One run; see the module."""

    size: str
    seed: int
    order: str
    method: str
    setting: str

    @property
    def key(self) -> str:
        """Names its line."""
        return f"{self.size}/{self.seed}/{self.order}/{self.method}/{self.setting}"


def planned(size: Size) -> list[list[Run]]:
    """In waves: a later one reads what an earlier one left. Seed by seed, so that a run cut short has whole seeds."""
    waves: list[list[Run]] = [[], []]
    for seed in range(size.seeds):
        for order in tasks.ORDERS:
            waves[0].append(Run(size.name, seed, order, UNTUNED, "-"))
            for method, settings in size.plan.items():
                runs = [Run(size.name, seed, order, method, setting) for setting in settings]
                waves[1 if method in POSTHOC else 0].extend(runs)
    return waves


def order_of(size: Size, order: str, seed: int) -> tuple[str, ...]:
    """Return the size's new tasks in an order that begins at another one for each seed: every task comes first once."""
    names = [task for task in tasks.ORDERS[order] if task in size.tasks]
    start = seed % len(names)
    return (*names[start:], *names[:start])


# Doing one.


def do(world: World, run: Run) -> Line:
    """Run it and say what was measured.

    Returns:
        The line: the run, ``seconds``, and ``stages``: after so many tasks, exact match and loss of the ``new`` tasks
        so far and of the ``old`` ones, each ``[exact, loss]``. A run that learns one task alone has the stage 1 only.
    """
    started = time.monotonic()
    if run.method == UNTUNED:
        stages = {0: _measure(world, world.load_base(), run, order_of(world.size, run.order, run.seed))}
    elif run.method in POSTHOC:
        stages = _do_posthoc(world, run)
    else:
        stages = _learn(world, run)
    line = {"key": run.key, **vars(run), "stages": {str(stage): found for stage, found in stages.items()}}
    return line | {"seconds": round(time.monotonic() - started, 2)}


def _learn(world: World, run: Run) -> dict[int, Line]:
    """Learn the tasks of the order, one after the other."""
    model, stages = world.load_base(), {}
    kept: dict[str, Any] = {}
    setting, _, rate = run.setting.partition("@")
    names = _names(world.size, run)
    with tempfile.TemporaryDirectory(prefix="fisherkit-forgetting-") as scratch:
        for number, name in enumerate(names):
            folder = Path(scratch, str(number))
            folder.mkdir()
            items = world.new_items(name, run.seed, "train")
            stage = Stage(
                world=world,
                model=model,
                seed=run.seed,
                number=number,
                name=name,
                items=items,
                rows=world.chat.tokens(items),
                folder=folder,
                rate=float(rate or 1),
                kept=kept,
            )
            LEARN[run.method](stage, setting)
            model = stage.model
            stages[number + 1] = _measure(world, model, run, names[: number + 1])
            if number + 1 in (_SINGLE, len(world.size.tasks)) and _is_kept(world.size, run):
                _keep(world, model, _folder_of(world, run, number + 1))
            shutil.rmtree(folder)
    return stages


def _names(size: Size, run: Run) -> tuple[str, ...]:
    """Return the names of what a run learns: all tasks of its order, or the first alone."""
    names = order_of(size, run.order, run.seed)
    return names if run.setting in size.sequences.get(run.method, ()) else names[:_SINGLE]


def _is_kept(size: Size, run: Run) -> bool:
    return any(POSTHOC[method].of == (run.method, run.setting) for method in size.plan if method in POSTHOC)


def _folder_of(world: World, run: Run, stage: int) -> Path:
    return world.folder / "tuned" / run.key.replace("/", "_") / str(stage)


def _keep(world: World, model: Any, folder: Path) -> None:
    staged = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    save(model, world, staged)
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)


def _do_posthoc(world: World, run: Run) -> dict[int, Line]:
    """On the fine-tune of the first task alone, as FAPM was published, and on that of all of them."""
    names = _names(world.size, run)
    tuned_by = Run(run.size, run.seed, run.order, *POSTHOC[run.method].of)
    folders = {stage: _folder_of(world, tuned_by, stage) for stage in sorted({_SINGLE, len(names)})}
    if not all(folder.is_dir() for folder in folders.values()):
        _learn(world, tuned_by)
    stages = {}
    with tempfile.TemporaryDirectory(prefix="fisherkit-forgetting-") as scratch:
        for stage, folder in folders.items():
            out, own = Path(scratch, str(stage)), Path(scratch, f"{stage}-files")
            own.mkdir()
            items = [item for name in names[:stage] for item in world.new_items(name, run.seed, "train")]
            random.Random(f"posthoc {run.seed}").shuffle(items)  # a Fisher and covariances are of the first ones
            tuned = Finished(world=world, tuned=folder, items=items, seed=run.seed, folder=own)
            keep_part(tuned, run.method, run.setting, out)
            stages[stage] = _measure(world, models.load(out, world.size.device), run, names[:stage])
    return stages


def _measure(world: World, model: Any, run: Run, names: Iterable[str]) -> Line:
    new = {name: world.chat.tokens(world.new_items(name, run.seed, "test")) for name in names}
    old = world.old_tests()
    scores = models.measure(model, new | old, world.size.device)
    rounded = {name: [round(score.exact, 6), round(score.loss, 6)] for name, score in scores.items()}
    return {"new": {name: rounded[name] for name in new}, "old": {name: rounded[name] for name in old}}


# Doing all.


def read_lines(path: Path) -> list[Line]:
    """Finished runs; a last line that was cut off by a kill is not one."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def do_all(world: World, results: Path, *, workers: int, threads: int, until: float, say: Callable[[str], None]) -> int:
    """Do what is not in ``results`` yet, ``workers`` at a time, each in ``threads`` threads.

    Args:
        world: see World.
        results: a line is added for every run that ends.
        workers: processes.
        threads: of each.
        until: no run begins after this time (``time.monotonic()``).
        say: gets a line per run.

    Returns:
        How many runs are left to do.
    """
    done = {line["key"] for line in read_lines(results)}
    waves = [[run for run in wave if run.key not in done] for wave in planned(world.size)]
    left, finished, made = sum(map(len, waves)), 0, _machine(world.size.device, threads)
    if not left:
        return 0
    _end_line(results)
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (threads,)) as pool:
        for wave in waves:
            for line in _in_turn(pool, world, iter(wave), workers, until):
                finished += 1
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | {"made": made}) + "\n")
                say(f"{finished}/{left} {line['key']}: {line['seconds']:.1f} s")
    return left - finished


def _begin(threads: int) -> None:
    """Begin a worker: it ends with the process that started it, however that one ends."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    models.be_repeatable(threads)


def _in_turn(
    pool: ProcessPoolExecutor, world: World, runs: Iterator[Run], workers: int, until: float
) -> Iterator[Line]:
    """Lines as they come; no more runs are handed out than can begin."""
    going: set[Future[Line]] = set()
    while True:
        while len(going) < workers and time.monotonic() < until and (run := next(runs, None)) is not None:
            going.add(pool.submit(do, world, run))
        if not going:
            return
        ended, going = wait(going, return_when=FIRST_COMPLETED)
        for one in ended:
            yield one.result()


def _machine(device: str, threads: int) -> dict[str, str]:
    """Return the machine and versions that made a line."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    card = torch.cuda.get_device_name() if device.startswith("cuda") else f"{threads} thread(s) a run"
    return {
        "commit": described.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "CPU": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "on": card,
    }


def _end_line(results: Path) -> None:
    """A line that was cut off must not swallow the next."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.exists() and (data := results.read_bytes()) and not data.endswith(b"\n"):
        with results.open("ab") as file:
            file.write(b"\n")
            os.fsync(file.fileno())
