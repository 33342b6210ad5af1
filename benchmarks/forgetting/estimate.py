"""About how long the runs that are left take: steps and items counted, and one step and one item timed here."""

import time
from collections import Counter
from collections.abc import Callable

from benchmarks.forgetting import model as models
from benchmarks.forgetting import tasks
from benchmarks.forgetting.held import LEARN
from benchmarks.forgetting.lines import Run
from benchmarks.forgetting.runs import Bench
from benchmarks.forgetting.settings import Setting
from benchmarks.forgetting.sizes import Size
from benchmarks.forgetting.text import Chat, new_tokenizer

_TIMES = {"distil": 2.0, "replay": 1.4, "fggm": 1.6, "fggm-output": 1.6, "lora": 1.2, "regmean-onward": 2.0}
"""Time of a course over plain's, of methods that take more than a step of plain fine-tuning (1.1 for the others)."""
_POSTHOC_SECONDS = 0.5


def estimate(bench: Bench, workers: int) -> str:
    """Return what is left and the minutes it takes."""
    size = bench.size
    step, measured = _timed(size)
    runs = bench.left()
    settings = 1 + 2 * len((*size.learners, *size.sequences)) + sum(map(len, size.more_sequences.values()))
    sequences = size.passes * len(size.sequence_cells(0)) * settings
    known = any(run.kind == "all" for run in runs) or not runs
    seconds = sum(_seconds(size, run, step, measured) for run in runs)
    if not known:
        one = len(size.tasks) * (1.2 * size.course.steps * step + measured / 4) + measured
        seconds += sequences * one
    bases = sum(not (world.folder / "base").is_dir() for world in bench.worlds.values())
    base_step = step * size.base.batch / size.course.batch * 1.1
    seconds += bases * size.base.steps * base_step
    kinds = Counter(run.kind for run in runs)
    later = 0 if known else sequences
    return (
        f"{size.name}: {kinds['one']} runs of one task and {kinds['all'] + later} sequences are left, {bases} bases; "
        f"a step takes {1000 * step:.0f} ms and a measurement {measured:.2f} s here: about "
        f"{seconds / workers / 60:.0f} minutes with {workers} workers"
    )


def _seconds(size: Size, run: Run, step: float, measured: float) -> float:
    if run.method not in LEARN:
        return measured + (0 if run.method == "base" else _POSTHOC_SECONDS)
    count = len(size.tasks) if run.kind == "all" else 1
    course = _TIMES.get(run.method, 1.1) * size.course.steps * Setting.of(run.setting).length * step
    return count * (course + (measured / 4 if run.kind == "all" else 0)) + measured


def _timed(size: Size) -> tuple[float, float]:
    """Return seconds of a step of a course and of a measurement, of an untrained model of the size."""
    models.be_repeatable(1)
    tokenizer = new_tokenizer()
    model = models.new_llama(len(tokenizer), size.hidden, size.layers, seed=0).to(size.device)
    count = len(tasks.BASE) * size.old_items + size.test_items + 4 * size.windows
    rows = Chat.of(tokenizer).tokens(list(tasks.takes_turns(tasks.BASE, "test", count, "estimate")))
    course = models.Course(steps=12, rate=1e-4, batch=size.course.batch)
    weights = list(models.matrices(model).values())

    def train() -> None:
        models.train(model, models.batches(rows, course, "estimate"), course, size.device, weights=weights)

    # What one thread works on a CPU is the same however busy the machine is.
    clock = time.process_time if size.device == "cpu" else time.perf_counter
    return _time(train, clock) / course.steps, _time(lambda: models.measure(model, {"x": rows}, size.device), clock)


def _time(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Best of three, after one to warm up."""
    work()
    found = []
    for _ in range(3):
        started = clock()
        work()
        found.append(clock() - started)
    return min(found)
