"""Sizes of the benchmark: the model, the courses, the tasks, and which methods are compared over what."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.forgetting.measures import Cell
from benchmarks.forgetting.model import Course
from benchmarks.forgetting.settings import MORE, PARTS, whole_grid

SEQUENCE_SHIFT = 50
"""Sequences draw the tasks of other seeds than the runs of one task from which their settings are chosen."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the benchmark.

    Attributes:
        name: of it.
        hidden: width of the base.
        layers: blocks of the base.
        base: course of the base.
        base_items: items of the base's tasks, each in its share.
        text_bytes: of plain text that the base reads, the held-out end of it not counted.
        window: tokens of a piece of plain text.
        course: of each new task under plain fine-tuning; settings change its rate and length.
        tasks: the new tasks.
        task_items: training items of each.
        test_items: test items of each new task.
        old_items: test items of each of the base's.
        windows: pieces of held-out text, four windows each.
        probes: old items that methods may look at.
        bases: base models, each trained from a seed of its own. Of several, nothing is chosen by the last one.
        seeds: draws of the new tasks.
        passes: times that every draw is made, each time on the base after the one before. The first pass alone says
            which settings learn the sequences, and is followed by them: so it can be read while the rest is made.
        learners: methods whose whole grid is run on one task, and whose two best settings learn the sequence.
        extra: settings on one task besides the grids, which no curve is made of.
        courses: settings of longer courses, for the first draw on the first base alone.
        posthoc: settings of methods that act on a finished fine-tune; their curves are made of ``settings.PARTS``.
        sequences: methods that learn sequences with the settings of another.
        more_sequences: settings that learn the sequences besides those that were chosen.
        device: of the models.
    """

    name: str
    hidden: int
    layers: int
    base: Course
    base_items: int
    text_bytes: int
    window: int = 40
    course: Course
    tasks: tuple[str, ...] = ("cipher", "order", "stack", "unit", "table")
    task_items: int
    test_items: int
    old_items: int
    windows: int
    probes: int = 208
    bases: tuple[int, ...] = (0, 1, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    passes: int = 1
    learners: tuple[str, ...]
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    courses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    posthoc: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sequences: Mapping[str, str] = field(default_factory=dict)
    more_sequences: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    device: str = "cpu"

    def cells(self, number: int) -> list[Cell]:
        """Return the places of a pass's runs of one task: tasks by draws, each draw on a base of its own."""
        return [
            Cell(self.bases[(at + number) % len(self.bases)], seed, task)
            for at, seed in enumerate(self.seeds)
            for task in self.tasks
        ]

    def sequence_cells(self, number: int) -> list[Cell]:
        """Return the places of a pass's sequences, each of which begins with another task."""
        bases = [(at + number) % len(self.bases) for at in range(len(self.tasks))]
        return [
            Cell(self.bases[base], SEQUENCE_SHIFT + self.seeds[base % len(self.seeds)], task)
            for base, task in zip(bases, self.tasks, strict=True)
        ]

    def design_cells(self) -> set[Cell]:
        """Return the places whose runs choose settings: of the first pass, without the last of several bases."""
        return {cell for cell in self.cells(0) if cell.base in self.design_bases()}

    def design_bases(self) -> tuple[int, ...]:
        """Return the bases by which settings may be chosen."""
        return self.bases[:-1] or self.bases


def order_of(size: Size, first: str) -> tuple[str, ...]:
    """Return the order of a sequence: the size's tasks, beginning with one of them."""
    at = size.tasks.index(first)
    return (*size.tasks[at:], *size.tasks[:at])


_QUICK_LEARNERS = ("plain", "fggm", "activation", "ewc", "pull", "distil", "replay", "lora", "shield")
_FULL_LEARNERS = (
    *_QUICK_LEARNERS,
    "random-rows",
    "migu",
    "fisher-subspace",
    "fggm-output",
    "protect",
    "layer-scale",
    "weight-subspace",
    "kron",
    "ewc-data",
    "l2-sp",
    "recadam",
    "pull-fisher",
    "lora+shield",
    "lora+layer-scale",
    "regmean-onward",
    "shield-text",
)
_COURSES = {
    "plain": ("-@0.1x4", "-@0.3x4"),
    "ewc": ("10@1x4",),
    "distil": ("5@0.4x4",),
    "shield": ("5@0.4x4", "5@1x4"),
}
_LONG_COURSES = {
    "plain": ("-@0.1x4", "-@0.2x4", "-@0.3x4", "-@1x4", "-@0.1x16", "-@0.3x16", "-@1x16"),
    "ewc": ("10@0.4x4", "10@1x4", "10@2.5x4", "10@0.4x16", "10@1x16"),
    "distil": ("5@0.4x4", "5@1x4", "5@2.5x4", "5@0.4x16", "5@1x16"),
    "shield": ("5@0.4x4", "5@1x4", "5@2.5x4", "15@1x4", "5@0.4x16", "5@1x16", "15@1x16"),
    "lora": ("4@0.4x4", "4@1x4", "16@1x4"),
}
_POSTHOC = {method: PARTS[method] for method in ("fapm", "magnitude", "random", "wise-ft", "regmean")}
_LONG_POSTHOC = {method: whole_grid(method) for method in PARTS}

_MASK_RATIOS = tuple(f"{ratio}@1" for ratio in ("0.05", "0.1", "0.3", "0.6", "0.9"))

SIZES = {
    "toy": Size(
        name="toy",
        hidden=32,
        layers=2,
        base=Course(steps=6, rate=2e-2, batch=12),
        base_items=80,
        text_bytes=20_000,
        window=24,
        course=Course(steps=2, rate=1e-3, batch=4, warmup=1),
        tasks=("cipher", "unit"),
        task_items=24,
        test_items=4,
        old_items=4,
        windows=2,
        probes=7,
        bases=(0, 1),
        seeds=(0, 1),
        learners=_FULL_LEARNERS,
        courses={"plain": ("-@0.1x4",), "shield": ("5@1x4",)},
        posthoc={method: settings[:1] for method, settings in PARTS.items()},
        sequences={"shield-onward": "shield"},
        more_sequences={"fggm": _MASK_RATIOS[:3]},
    ),
    "quick": Size(
        name="quick",
        hidden=96,
        layers=4,
        base=Course(steps=600, rate=2e-2, batch=24, warmup=30),
        base_items=20_000,
        text_bytes=600_000,
        course=Course(steps=40, rate=3e-3, batch=8, warmup=5),
        task_items=400,
        test_items=32,
        old_items=14,
        windows=8,
        learners=_QUICK_LEARNERS,
        courses=_COURSES,
        posthoc=_POSTHOC,
        sequences={"shield-onward": "shield"},
    ),
    "full": Size(
        name="full",
        hidden=128,
        layers=4,
        base=Course(steps=540, rate=2e-2, batch=24, warmup=30),
        base_items=20_000,
        text_bytes=1_000_000,
        course=Course(steps=48, rate=3e-3, batch=8, warmup=6),
        task_items=400,
        test_items=48,
        old_items=20,
        windows=12,
        passes=3,
        learners=_FULL_LEARNERS,
        extra={method: MORE[method] for method in ("shield", "fisher-subspace")},
        courses=_LONG_COURSES,
        posthoc=_LONG_POSTHOC,
        sequences={"shield-onward": "shield"},
        more_sequences={"fggm": _MASK_RATIOS},
    ),
    "gpu": Size(
        name="gpu",
        hidden=768,
        layers=14,
        base=Course(steps=4000, rate=2e-2, batch=192, warmup=200),
        base_items=400_000,
        text_bytes=8_000_000,
        window=128,
        course=Course(steps=64, rate=5e-4, batch=16, warmup=8),
        task_items=1000,
        test_items=100,
        old_items=48,
        windows=64,
        bases=(0,),
        learners=_QUICK_LEARNERS,
        courses=_COURSES,
        posthoc=_POSTHOC,
        sequences={"shield-onward": "shield"},
        device="cuda",
    ),
}
