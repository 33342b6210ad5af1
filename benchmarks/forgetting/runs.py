"""Runs: which there are to do, doing one, and doing all that are left, some at a time.

Of each pass the runs of one task come first. The sequences wait for them: each method learns these at its two best
settings.
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from benchmarks.forgetting import model as models
from benchmarks.forgetting.choose import best_settings
from benchmarks.forgetting.held import LEARN
from benchmarks.forgetting.lines import Line, Run, add_line, begin_session, read_lines
from benchmarks.forgetting.methods import Stage, save
from benchmarks.forgetting.posthoc import POSTHOC, Finished, keep_part
from benchmarks.forgetting.results import Results
from benchmarks.forgetting.settings import Setting, grid
from benchmarks.forgetting.sizes import Size, order_of
from benchmarks.forgetting.world import World

UNTUNED = ("base", "-")
"""Method and setting of a run that does nothing: what the base is worth."""
Say = Callable[[str], None]


# What there is to do.


def of_one_task(size: Size, number: int) -> list[Run]:
    """Return a pass's runs of one task, draw by draw, so that a pass cut short has whole draws."""
    found = []
    for at, cell in enumerate(size.cells(number)):
        arms = [UNTUNED, *((method, setting) for method in size.learners for setting in grid(method))]
        for part in (size.extra, size.posthoc):
            arms += [(method, setting) for method, settings in part.items() for setting in settings]
        if number == 0 and at < len(size.tasks):  # the first draw on the first base
            arms += [(method, setting) for method, settings in size.courses.items() for setting in settings]
        found += [Run(cell, "one", *arm) for arm in arms]
    return found


def of_sequences(size: Size, lines: Iterable[Line], number: int) -> list[Run]:
    """Return a pass's sequences, with the settings that the first pass chose; none before that is done."""
    lines = list(lines)
    done = {line["key"] for line in lines}
    if any(run.key not in done for run in of_one_task(size, 0)):
        return []
    results, cells = Results(lines), size.design_cells()
    chosen = {method: best_settings(results, method, grid(method), cells) for method in size.learners}
    chosen |= {method: chosen[other] for method, other in size.sequences.items()}
    arms = [UNTUNED, *((method, setting) for method, settings in chosen.items() for setting in settings)]
    arms += [(method, setting) for method, settings in size.more_sequences.items() for setting in settings]
    return [Run(cell, "all", *arm) for cell in size.sequence_cells(number) for arm in dict.fromkeys(arms)]


def still_to_do(size: Size, lines: Iterable[Line], number: int) -> tuple[list[Run], list[Run]]:
    """Return what is left of a pass: runs of one task, and of the sequences those that are known."""
    lines = list(lines)
    done = {line["key"] for line in lines}
    single, sequences = of_one_task(size, number), of_sequences(size, lines, number)
    return [run for run in single if run.key not in done], [run for run in sequences if run.key not in done]


def whole_passes(size: Size, lines: Iterable[Line]) -> int:
    """Return how many passes have nothing left."""
    lines = list(lines)
    if still_to_do(size, lines, 0)[0]:
        return 0
    return sum(not any(still_to_do(size, lines, number)) for number in range(size.passes))


# Doing one.


def do(world: World, run: Run) -> Line:
    """Run it and say what was measured.

    Returns:
        The line: its key, ``seconds``, and ``[exact match, loss]`` of the ``new`` tasks and of the ``old`` ones at the
        end, and of each new task right after it was ``learnt``.
    """
    started = time.monotonic()
    names = order_of(world.size, run.cell.task) if run.kind == "all" else (run.cell.task,)
    learnt: Line = {}
    if (run.method, run.setting) == UNTUNED:
        model = world.load_base()
    elif run.method in POSTHOC:
        model = _kept_part(world, run)
    else:
        model, learnt = _learn(world, run, names)
    found = {
        "new": _measure(world, model, run, names),
        "old": _rounded(models.measure(model, world.old_tests, _on(world))),
    }
    line = {"key": run.key, **found} | ({"learnt": learnt} if run.kind == "all" else {})
    return line | {"seconds": round(time.monotonic() - started, 2)}


def _learn(world: World, run: Run, names: Sequence[str], keep: Path | None = None) -> tuple[Any, Line]:
    """Learn tasks one after the other; the model, and what each was worth right after it."""
    model, learnt = world.load_base(), {}
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fisherkit-forgetting-") as scratch:
        for number, name in enumerate(names):
            folder = Path(scratch, str(number))
            folder.mkdir()
            stage = Stage(
                world=world,
                model=model,
                setting=Setting.of(run.setting),
                seed=run.cell.seed,
                number=number,
                name=name,
                items=world.new_items(name, run.cell.seed, "train"),
                folder=folder,
                kept=kept,
            )
            LEARN[run.method](stage)
            model = stage.model
            if run.kind == "all":
                learnt |= _measure(world, model, run, [name])
            shutil.rmtree(folder)
    if keep is not None:
        save(model, world, keep)
    return model, learnt


def _kept_part(world: World, run: Run) -> Any:
    """Make the fine-tune, unless another run has, and keep the part of it that the method keeps."""
    of = Run(run.cell, "one", *POSTHOC[run.method].of)
    name = f"tuned-{of.key.replace('/', '_')}"
    tuned = world.made(name, lambda folder: void(_learn(world, of, [run.cell.task], folder)))
    with tempfile.TemporaryDirectory(prefix="fisherkit-forgetting-") as scratch:
        out, own = Path(scratch, "out"), Path(scratch, "files")
        own.mkdir()
        items = world.new_items(run.cell.task, run.cell.seed, "train")
        keep_part(
            Finished(world=world, tuned=tuned, items=items, seed=run.cell.seed, folder=own),
            run.method,
            run.setting,
            out,
        )
        return models.load(out, _on(world))


def void(value: object) -> None:
    """Take a value where none is wanted."""


def _measure(world: World, model: Any, run: Run, names: Iterable[str]) -> Line:
    new = {name: world.chat.tokens(world.new_items(name, run.cell.seed, "test")) for name in names}
    return _rounded(models.measure(model, new, _on(world)))


def _rounded(scores: Mapping[str, models.Score]) -> Line:
    return {name: [round(score.exact, 4), round(score.loss, 5)] for name, score in scores.items()}


def _on(world: World) -> str:
    return world.size.device


# Doing all.


class Bench:
    """Worlds of a size, and the file that its lines go to.

    Args:
        work: folder of models and masks.
        size: see Size.
        results: a line is added for every run that ends.
        given: a checkpoint to take as base; None to train some.
    """

    def __init__(self, work: Path, size: Size, results: Path, given: str | None = None) -> None:
        self.size, self.results = size, results
        self.worlds = {base: World(work, size, base, given) for base in size.bases}

    def left(self) -> list[Run]:
        """Return what is known to be left, in the order in which it is done."""
        return [run for stage in self._stages() for run in stage]

    def _stages(self) -> Iterator[list[Run]]:
        """Yield what is left of each pass's runs of one task, then of its sequences."""
        lines = read_lines(self.results)
        for number in range(self.size.passes):
            yield from filter(None, still_to_do(self.size, lines, number))

    def do_all(self, *, workers: int, threads: int, until: float, say: Say) -> int:
        """Do what is left, ``workers`` at a time, each in ``threads`` threads; begin none after ``until``.

        Returns:
            How many runs are known to be left.
        """
        if not self.left():
            return 0
        begin_session(self.results, self.size.device, threads)
        with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (threads, self.worlds)) as pool:
            bases = [pool.submit(_prepare, base) for base in self.worlds]
            for base in bases:
                say(base.result())
            while (runs := next(self._stages(), None)) and time.monotonic() < until:
                for at, line in enumerate(_in_turn(pool, iter(runs), workers, until), 1):
                    add_line(self.results, line)
                    say(f"{at}/{len(runs)} {line['key']}: {line['seconds']:.1f} s")
        return len(self.left())


_WORLDS: dict[int, World] = {}
"""Of a worker: what it has loaded stays loaded from run to run."""


def _prepare(base: int) -> str:
    """Make the base and what most methods read."""
    started, world = time.monotonic(), _WORLDS[base]
    world.fisher("data")
    return f"{world.base}: the base and its Fisher, {time.monotonic() - started:.0f} s"


def _do(run: Run) -> Line:
    return do(_WORLDS[run.cell.base], run)


def _begin(threads: int, worlds: dict[int, World]) -> None:
    """Begin a worker: it ends with the process that started it, however that one ends."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    models.be_repeatable(threads)
    _WORLDS.update(worlds)


def _in_turn(pool: ProcessPoolExecutor, runs: Iterator[Run], workers: int, until: float) -> Iterator[Line]:
    """Lines as they come; no more runs are handed out than can begin."""
    going: set[Future[Line]] = set()
    while True:
        while len(going) < workers and time.monotonic() < until and (run := next(runs, None)) is not None:
            going.add(pool.submit(_do, run))
        if not going:
            return
        ended, going = wait(going, return_when=FIRST_COMPLETED)
        for one in ended:
            yield one.result()
