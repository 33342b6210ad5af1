"""Methods that act while a task is learnt, without a mask: plain, penalties, pulls, distillation, replay.

All train the matrices of the blocks by the course of their setting and differ in one thing. Those with masks are in
``held``. What is old comes from the probes alone, which are of half of the old tasks.
"""

import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.forgetting import model as models
from benchmarks.forgetting.model import Course
from benchmarks.forgetting.settings import Setting
from benchmarks.forgetting.tasks import Item
from benchmarks.forgetting.text import Tokens
from benchmarks.forgetting.world import Look, World

Watch = Callable[[Optimizer], object]
_TASK_SHARE = 50
"""Replay keeps one item in so many of each task that it has learnt."""


@dataclass(kw_only=True)
class Stage:
    """A task about to be learnt.

    Attributes:
        world: what all runs share.
        model: as the tasks before it left it.
        setting: of the method.
        seed: of the run.
        number: of the task in its order, from 0.
        name: of the task.
        items: its training items.
        folder: for what a method writes; empty.
        kept: what a method wants to find again at the next task.
    """

    world: World
    model: Any
    setting: Setting
    seed: int
    number: int
    name: str
    items: list[Item]
    folder: Path
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def course(self) -> Course:
        """Course of the setting."""
        return self.world.size.course.changed(self.setting.rate, self.setting.length)

    @property
    def strength(self) -> float:
        """Strength of the setting, where that is a number."""
        return float(self.setting.strength)

    @cached_property
    def rows(self) -> list[Tokens]:
        """Training items as tokens."""
        return self.world.chat.tokens(self.items)

    def batches(self) -> Iterator[list[Tokens]]:
        """Yield batches, the same ones for every method."""
        return models.batches(self.rows, self.course, f"{self.seed} {self.name}")

    def base_weights(self) -> dict[str, Tensor]:
        """Return the base's matrices, whatever was learnt since."""
        if "base" not in self.kept:
            weights = models.matrices(self.world.load_base())
            self.kept["base"] = {name: weight.detach() for name, weight in weights.items()}
        found: dict[str, Tensor] = self.kept["base"]
        return found


def train(
    stage: Stage,
    *,
    rate: float = 1.0,
    watch: Watch = lambda optimizer: None,
    weights: Sequence[nn.Parameter] | None = None,
    data: Iterator[list[Tokens]] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train the setting's course on the task; ``rate`` is a share of its rate."""
    models.train(
        stage.model,
        data or stage.batches(),
        stage.course.changed(rate, 1),
        stage.world.size.device,
        weights=weights or list(models.matrices(stage.model).values()),
        watch=watch,
        penalty=penalty,
    )


def _plain(stage: Stage) -> None:
    train(stage)


# Penalties in the loss.


def _l2_sp(stage: Stage) -> None:
    """Half the strength times the squared distance from the base (arXiv 1802.01483)."""
    _penalised(stage, {name: torch.ones(()) for name in models.matrices(stage.model)})


def _ewc(stage: Stage, look: Look = "sampled") -> None:
    """The same, each weight by its Fisher over the mean of all; labels that the base draws (arXiv 1612.00796)."""
    if "ewc" not in stage.kept:
        fisher = load_file(stage.world.fisher(look), device=stage.world.size.device)
        mean = sum(float(v.double().sum()) for v in fisher.values()) / sum(v.numel() for v in fisher.values())
        stage.kept["ewc"] = {name: values / mean for name, values in fisher.items()}
    _penalised(stage, stage.kept["ewc"])


def _ewc_data(stage: Stage) -> None:
    """With the labels of the data, whose gradients vanish where the base is sure."""
    _ewc(stage, "data")


def _penalised(stage: Stage, importance: Mapping[str, Tensor]) -> None:
    base, weights = stage.base_weights(), models.matrices(stage.model)

    def penalty() -> Tensor:
        parts = [(importance[name] * (weight - base[name]).square()).sum() for name, weight in weights.items()]
        return stage.strength / 2 * torch.stack(parts).sum()

    train(stage, penalty=penalty)


def _distil(stage: Stage) -> None:
    """KL from the base on as many of the probes as the batch has items, drawn anew each step."""
    world, rng = stage.world, random.Random(f"distil {stage.seed} {stage.name}")

    def penalty() -> Tensor:
        drawn = rng.sample(range(len(world.probe_rows)), min(stage.course.batch, len(world.probe_rows)))
        rows, taught = [world.probe_rows[at] for at in drawn], [world.taught[at] for at in drawn]
        return stage.strength * models.kl_from(stage.model, rows, taught, world.size.device)

    train(stage, penalty=penalty)


# Pulls after the step, decoupled from the gradient.


def _pull(stage: Stage) -> None:
    """Towards the base, every weight by the same share: the shield's rule without directions."""
    _pulled(stage, {name: torch.tensor(stage.strength) for name in models.matrices(stage.model)})


def _pull_fisher(stage: Stage) -> None:
    """By the square root of the base's Fisher over its mean in the matrix."""
    fisher = load_file(stage.world.fisher("sampled"), device=stage.world.size.device)
    weights = models.matrices(stage.model)
    _pulled(stage, {name: stage.strength * (fisher[name] / fisher[name].mean()).sqrt() for name in weights})


def _pulled(stage: Stage, strengths: Mapping[str, Tensor]) -> None:
    """Train; after a step at a share p of the peak rate the drift is divided by 1 + p strength / sum of all p."""
    base, weights, course = stage.base_weights(), models.matrices(stage.model), stage.course

    def watch(optimizer: Optimizer) -> None:
        @torch.no_grad()
        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            pace = optimizer.param_groups[0]["lr"] / course.rate / course.peak_steps
            for name, weight in weights.items():
                weight.copy_(base[name] + (weight - base[name]) / (1 + pace * strengths[name]))

        optimizer.register_step_post_hook(after)

    train(stage, watch=watch)


def _recadam(stage: Stage) -> None:
    """Anneal from the pull to the task by a sigmoid at half of the course (arXiv 2004.12651).

    A step of AdamW counts by the sigmoid, and by the rest of it the drift from the base shrinks by the strength.
    """
    base, weights, course = stage.base_weights(), models.matrices(stage.model), stage.course
    before: dict[str, Tensor] = {}
    step = iter(range(course.steps))

    def watch(optimizer: Optimizer) -> None:
        def remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            before.update({name: weight.detach().clone() for name, weight in weights.items()})

        @torch.no_grad()
        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            share = 1 / (1 + math.exp(-10 * (next(step) / course.steps - 0.5)))
            pull = (1 - share) * stage.strength * optimizer.param_groups[0]["lr"] / course.rate
            for name, weight in weights.items():
                weight.copy_(before[name] + share * (weight - before[name]) - pull * (before[name] - base[name]))

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(after)

    train(stage, watch=watch)


# Old data.


def _replay(stage: Stage) -> None:
    """On top of every batch a share of it (the strength): probes with answers, a few items of each task before."""
    rng = random.Random(f"replay {stage.seed} {stage.name}")
    store: list[Tokens] = stage.kept.setdefault("store", list(stage.world.probe_rows))
    more = max(1, round(stage.strength * stage.course.batch))
    train(stage, data=(rows + rng.sample(store, more) for rows in stage.batches()))
    store += stage.rows[: max(1, len(stage.rows) // _TASK_SHARE)]


WITHOUT_MASKS: Mapping[str, Callable[[Stage], None]] = {
    "plain": _plain,
    "l2-sp": _l2_sp,
    "ewc": _ewc,
    "ewc-data": _ewc_data,
    "distil": _distil,
    "pull": _pull,
    "pull-fisher": _pull_fisher,
    "recadam": _recadam,
    "replay": _replay,
}


def save(model: Any, world: World, folder: Path) -> None:
    """As a checkpoint with its tokenizer; an adapter as an adapter."""
    model.save_pretrained(folder)
    world.chat.tokenizer.save_pretrained(folder)
    gc.collect()
