"""Sizes of the benchmark: the model, the courses, the tasks, the seeds, and which methods at which settings.

A setting is one number or word that a method knows how to read; where it is a strength, several are swept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.forgetting.model import Course

Plan = Mapping[str, tuple[str, ...]]
"""Settings by method."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the benchmark.

    Attributes:
        name: of it; part of every run's key.
        hidden: width of the base.
        layers: blocks of the base.
        base: course of the base.
        base_items: items of the base's tasks, all taking turns.
        text_bytes: of plain text that the base reads, the held-out end of it not counted.
        window: tokens of a piece of plain text.
        course: of each new task under plain fine-tuning; methods change its rate.
        tasks: the new tasks.
        task_items: training items of each.
        test_items: test items of each new task.
        old_items: test items of each of the base's.
        windows: pieces of held-out text, four windows each.
        probes: samples of a Fisher.
        seeds: how many.
        plan: what is run.
        sequences: those of them that learn all tasks, one after the other; the others end with the first.
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
    tasks: tuple[str, ...]
    task_items: int
    test_items: int
    old_items: int
    windows: int
    probes: int = 208
    seeds: int = 5
    plan: Plan
    sequences: Plan
    device: str = "cpu"


_RATES = ("0.1", "0.3", "0.6", "1", "2")
"""Shares of the course's learning rate: the sweep that makes the curve of plain fine-tuning."""

_QUICK: Plan = {
    "plain": ("0.15", "0.3", "0.6", "1", "2"),
    "random-rows": ("0.3",),
    "migu": ("0.7",),
    "fggm": ("input-tensor-0.3",),
    "protect": ("none-0.5",),
    "fisher-subspace": ("0.25",),
    "weight-subspace": ("0.25",),
    "activation": ("0.9@3",),
    "ewc": ("0.1@2", "0.3", "0.3@2", "1"),
    "pull": ("0.06@2", "0.2@2"),
    "shield": ("0.06@2", "0.2@2", "0.6@2"),
    "shield-onward": ("0.2@2",),
    "replay": ("1",),
    "fapm": ("0.5", "0.9"),
    "magnitude": ("0.5", "0.9"),
    "random": ("0.5", "0.9"),
    "relative": ("0.9",),
    "dare": ("0.9",),
    "wise-ft": ("0.3", "0.6"),
    "regmean": ("0.1", "0.3", "1", "3", "10"),
    "regmean-text": ("0.3", "1", "3"),
    "fisher-merge": ("0.3", "3"),
    "shield+regmean": ("1",),
    "regmean-onward": ("1",),
    "fggm+fapm": ("0.9",),
}

_FULL: Plan = {
    "plain": _RATES,
    "plain-all-weights": ("0.5",),
    "early-stop": ("0.25", "0.5"),
    "random-rows": ("0.3",),
    "migu": ("0.7",),
    "fggm": ("input-tensor-0.5", "input-tensor-0.3", "input-tensor-0.1", "output-tensor-0.3", "none-global-0.3"),
    "protect": ("none-0.5", "none-0.8"),
    "layer-scale": ("0.5",),
    "fisher-subspace": ("0.25",),
    "weight-subspace": ("0.25",),
    "activation": ("0.9", "0.9@3", "0.98@3"),
    "kron": ("0.9@3",),
    "ewc": ("0.1@2", "0.3", "1"),
    "pull": ("0.06@2", "0.2@2"),
    "pull-fisher": ("0.2@2", "0.6@2"),
    "shield": ("0.06@2", "0.2@2", "0.6@2"),
    "shield-onward": ("0.2@2",),
    "replay": ("1",),
    "lora": ("0.25", "1"),
    "lora+activation": ("0.9",),
    "lora+shield": ("0.2@0.5", "0.2"),
    "fapm": ("0.5", "0.7", "0.9", "0.95", "0.99"),
    "magnitude": ("0.5", "0.9", "0.99"),
    "random": ("0.5", "0.9"),
    "relative": ("0.5", "0.9"),
    "dare": ("0.5", "0.9"),
    "wise-ft": ("0.1", "0.3", "0.5", "0.7"),
    "regmean": ("0.1", "0.3", "1", "3", "10"),
    "regmean-text": ("0.1", "0.3", "1", "3", "10"),
    "fisher-merge": ("0.1", "0.3", "1", "3", "10"),
    "lora+regmean": ("0.3", "1", "3"),
    "shield+regmean": ("0.3", "1", "3"),
    "regmean-onward": ("1",),
    "shield-merge": ("0.1", "0.3", "1"),
    "shield+fapm": ("0.5", "0.9"),
    "fggm+fapm": ("0.8", "0.9", "0.95"),
    "lora+fapm": ("0.05", "0.1", "0.3", "0.5"),
    "lora+magnitude": ("0.1", "0.5"),
}

_SEQUENCES: Plan = {
    "plain": ("0.3", "1"),
    "random-rows": ("0.3",),
    "migu": ("0.7",),
    "fggm": ("input-tensor-0.3",),
    "fisher-subspace": ("0.25",),
    "activation": ("0.9@3",),
    "ewc": ("0.3",),
    "pull": ("0.2@2",),
    "shield": ("0.2@2",),
    "shield-onward": ("0.2@2",),
    "replay": ("1",),
    "lora": ("0.25",),
    "fapm": ("0.5", "0.9"),
    "magnitude": ("0.9",),
    "random": ("0.9",),
    "wise-ft": ("0.3",),
    "regmean": ("1",),
    "regmean-text": ("1",),
    "regmean-onward": ("1",),
    "fggm+fapm": ("0.9",),
}
_FIVE = ("cipher", "order", "stack", "unit", "table")

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
        probes=4,
        seeds=2,
        plan={
            **{method: settings[:1] for method, settings in _FULL.items()},
            "plain": ("0.5", "1"),
            "fggm": ("input-tensor-0.3", "none-global-0.3"),
        },
        sequences=_SEQUENCES | {"plain": ("1",), "ewc": ("0.1@2",)},
    ),
    "quick": Size(
        name="quick",
        hidden=128,
        layers=4,
        base=Course(steps=1400, rate=2e-2, batch=24, warmup=30),
        base_items=24_000,
        text_bytes=600_000,
        course=Course(steps=48, rate=3e-3, batch=8, warmup=6),
        tasks=_FIVE,
        task_items=400,
        test_items=48,
        old_items=16,
        windows=8,
        plan=_QUICK,
        sequences=_SEQUENCES,
    ),
    "full": Size(
        name="full",
        hidden=192,
        layers=6,
        base=Course(steps=2500, rate=2e-2, batch=48, warmup=60),
        base_items=120_000,
        text_bytes=1_500_000,
        course=Course(steps=48, rate=2.5e-3, batch=8, warmup=6),
        tasks=_FIVE,
        task_items=600,
        test_items=64,
        old_items=24,
        windows=16,
        plan=_FULL,
        sequences=_SEQUENCES,
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
        tasks=(*_FIVE, "date"),
        task_items=1000,
        test_items=100,
        old_items=64,
        windows=64,
        probes=200,
        plan=_QUICK,
        sequences=_SEQUENCES,
        device="cuda",
    ),
}
