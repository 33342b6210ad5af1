"""Methods that act while a task is learnt: each changes a model, given the task's items and a setting.

All train the matrices of the blocks by the same course and differ in one thing. ``SETTING@RATE`` is a setting at a
share of the course's learning rate, which many methods need larger than plain fine-tuning does. Masks, subspaces,
Fishers and hooks are fisherkit's public ones; LoRA is peft's; penalties, pulls without directions and the replay are
written here.
"""

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

import fisherkit
from benchmarks.forgetting import model as models
from benchmarks.forgetting.model import Course
from benchmarks.forgetting.tasks import Item
from benchmarks.forgetting.text import Tokens
from benchmarks.forgetting.world import World, write_prompts
from fisherkit import ExtractOptions, MaskOptions, MergeOptions
from fisherkit.training import MIGU, constrain

Watch = Callable[[Optimizer], object]


@dataclass(kw_only=True)
class Stage:
    """A task about to be learnt.

    Attributes:
        world: what all runs share.
        model: as the tasks before it left it.
        seed: of the run.
        number: of the task in its order, from 0.
        name: of the task.
        items: its training items.
        rows: the same as tokens.
        folder: for what a method writes; empty.
        rate: a share of the course's learning rate.
        kept: what a method wants to find again at the next task.
    """

    world: World
    model: Any
    seed: int
    number: int
    name: str
    items: list[Item]
    rows: list[Tokens]
    folder: Path
    rate: float = 1.0
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def course(self) -> Course:
        """Course of plain fine-tuning."""
        return self.world.size.course


def _train(
    stage: Stage,
    *,
    rate: float = 1.0,
    watch: Watch = lambda optimizer: None,
    weights: Sequence[nn.Parameter] | None = None,
    data: Iterator[list[Tokens]] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train the course on the task; ``rate`` is a share of the course's, on top of the stage's own."""
    course = replace(stage.course, rate=rate * stage.rate * stage.course.rate)
    models.train(
        stage.model,
        data or _batches(stage),
        course,
        stage.world.size.device,
        weights=weights or list(models.matrices(stage.model).values()),
        watch=watch,
        penalty=penalty,
    )


def _batches(stage: Stage) -> Iterator[list[Tokens]]:
    """Yield batches, the same ones for every method."""
    return models.batches(stage.rows, stage.course, f"{stage.seed} {stage.name}")


# Controls.


def _plain(stage: Stage, setting: str) -> None:
    _train(stage, rate=float(setting))


def _plain_all_weights(stage: Stage, setting: str) -> None:
    _train(stage, rate=float(setting), weights=list(stage.model.parameters()))


def _early_stop(stage: Stage, setting: str) -> None:
    """Train the course as it is, cut off."""
    steps = round(float(setting) * stage.course.steps)
    _train(stage, data=(rows for _, rows in zip(range(steps), _batches(stage), strict=False)))


def _pull(stage: Stage, setting: str) -> None:
    """After every step, back towards the base, every weight by the same share (L2-SP, decoupled from the gradient)."""
    _pulled(stage, {name: torch.tensor(float(setting)) for name in models.matrices(stage.model)})


def _pull_fisher(stage: Stage, setting: str) -> None:
    """Pull, by the square root of the base's Fisher over its mean in the matrix (as RecAdam, but for the root)."""
    fisher = {name: values.to(stage.world.size.device) for name, values in load_file(stage.world.fisher).items()}
    weights = models.matrices(stage.model)
    _pulled(stage, {name: float(setting) * (fisher[name] / fisher[name].mean()).sqrt() for name in weights})


def _pulled(stage: Stage, strengths: Mapping[str, Tensor]) -> None:
    """Train; after a step at a share p of the peak rate, what weights have changed is divided by 1 + p strength."""
    weights = models.matrices(stage.model)
    if "start" not in stage.kept:
        stage.kept["start"] = {name: weight.detach().clone() for name, weight in weights.items()}
    start = stage.kept["start"]

    def watch(optimizer: Optimizer) -> None:
        peak = optimizer.param_groups[0]["lr"]

        @torch.no_grad()
        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            pace = optimizer.param_groups[0]["lr"] / peak
            for name, weight in weights.items():
                weight.copy_(start[name] + (weight - start[name]) / (1 + pace * strengths[name]))

        optimizer.register_step_post_hook(after)

    _train(stage, watch=watch)


def _replay(stage: Stage, setting: str) -> None:
    """A quarter of every batch is old: a hundredth of what the base learnt from, and of each task before this one."""
    rng = random.Random(f"replay {stage.seed} {stage.name}")
    store: list[Tokens] = stage.kept.setdefault("store", stage.world.replayed(stage.seed))
    quarter = stage.course.batch // 4
    _train(stage, data=(rows[quarter:] + rng.sample(store, quarter) for rows in _batches(stage)))
    store += stage.rows[: max(1, len(stage.rows) // 100)]


def _ewc(stage: Stage, setting: str) -> None:
    """A penalty on leaving the base, weighted by its Fisher; the setting is the weight of a Fisher whose mean is 1."""
    weights = models.matrices(stage.model)
    if "ewc" not in stage.kept:
        fisher = {name: values.to(stage.world.size.device) for name, values in load_file(stage.world.fisher).items()}
        mean = sum(float(values.double().sum()) for values in fisher.values()) / sum(v.numel() for v in fisher.values())
        start = {name: weight.detach().clone() for name, weight in weights.items()}
        stage.kept["ewc"] = {name: (values / mean, start[name]) for name, values in fisher.items()}
    anchored = [(weights[name], *pair) for name, pair in stage.kept["ewc"].items()]

    def penalty() -> Tensor:
        parts = [(fisher * (weight - start).square()).sum() for weight, fisher, start in anchored]
        return float(setting) / 2 * torch.stack(parts).sum()

    _train(stage, penalty=penalty)


# Masks.


def _under(stage: Stage, mask: Path, **options: Any) -> None:
    """Hold to a mask; pulls are per step of the peak rate here."""
    _train(stage, watch=lambda optimizer: constrain(optimizer, stage.model, mask, steps=1, **options))


def _random_rows(stage: Stage, setting: str) -> None:
    """As many rows as FGGM's, drawn anew for every task."""
    seed = 100 * stage.seed + stage.number
    options = MaskOptions(preset="fggm", keep=float(setting), score="random", seed=seed)
    _under(stage, stage.world.mask(f"random-{setting}-{seed}", options))


def _migu(stage: Stage, setting: str) -> None:
    _train(stage, watch=lambda optimizer: MIGU(float(setting)).attach(optimizer, stage.model))


def _fggm(stage: Stage, setting: str) -> None:
    """A mask from the Fisher of the new task's own items at the current weights; for the first task too."""
    aggregate, scope, keep = setting.split("-")
    save(stage.model, stage.world, stage.folder / "now")
    prompts = write_prompts(stage.folder / "prompts.jsonl", stage.items)
    fisher, mask = stage.folder / "fisher.safetensors", stage.folder / "mask.safetensors"
    fisherkit.extract(stage.folder / "now", prompts, fisher, stage.world.extract_options())
    options: dict[str, Any] = {"aggregate": aggregate, "scope": scope, "keep": float(keep)}
    fisherkit.mask(fisher, mask, MaskOptions(train="top", **options))
    _under(stage, mask)


def _protect(stage: Stage, setting: str) -> None:
    """Protect the top of the base's Fisher may not change."""
    aggregate, keep = setting.split("-")
    options: dict[str, Any] = {"protect": "top", "aggregate": aggregate, "keep": float(keep)}
    _under(stage, stage.world.mask(f"protect-{setting}", MaskOptions(**options)))


def _layer_scale(stage: Stage, setting: str) -> None:
    """Layers with more of the base's Fisher move less; the setting is the power."""
    _under(stage, stage.world.fisher.with_name("layer_importance.json"), power=float(setting))


# Subspaces: of the base, a share of its width or of the energy.


def _fisher_subspace(stage: Stage, setting: str) -> None:
    """As the card describes: singular modes of the Fisher, on both sides."""
    options = MaskOptions(svd_rank=stage.world.rank(float(setting)), basis="fisher")
    _under(stage, stage.world.mask(f"fisher-subspace-{setting}", options))


def _weight_subspace(stage: Stage, setting: str) -> None:
    rank, weights = stage.world.rank(float(setting)), str(stage.world.base)
    options = MaskOptions(svd_rank=rank, basis="weight", weights=weights)
    _under(stage, stage.world.mask(f"weight-subspace-{setting}", options))


def _activation(stage: Stage, setting: str) -> None:
    _under(stage, _activation_mask(stage.world, setting))


def _activation_mask(world: World, setting: str) -> Path:
    return world.mask(f"activation-{setting}", MaskOptions(svd_energy=float(setting), basis="activation"))


def _kron(stage: Stage, setting: str) -> None:
    options = MaskOptions(svd_energy=float(setting), basis="kron")
    _under(stage, stage.world.mask(f"kron-{setting}", options))


def _shield(stage: Stage, setting: str) -> None:
    """Drawn back to the base, whatever was learnt since; the setting is the pull."""
    _under(stage, shield_mask(stage.world, setting), anchor=stage.world.base)


def _shield_onward(stage: Stage, setting: str) -> None:
    """Drawn back to where the task began, as when a fine-tune is fine-tuned."""
    _under(stage, shield_mask(stage.world, setting))


def shield_mask(world: World, pull: str) -> Path:
    """Return the preset's mask, pulling so hard."""
    return world.mask(f"shield-{pull}", MaskOptions(preset="shield", pull=float(pull)))


def _regmean_onward(stage: Stage, setting: str) -> None:
    """After every task, the solve over base and all fine-tunes so far is where the next task starts."""
    _train(stage)
    place = stage.folder.parent / f"tune-{stage.number}"
    save(stage.model, stage.world, place)
    prompts, new = write_prompts(place / "new.jsonl", stage.items), place.with_suffix(".safetensors")
    options = ExtractOptions(statistics="inputs", limit=stage.world.size.probes, device=stage.world.size.device)
    fisherkit.extract(place, prompts, new, options)
    tunes = stage.kept.setdefault("tunes", [])
    tunes.append((str(place), new))
    chosen = MergeOptions(
        regmean=(stage.world.old_inputs(text=False), tunes[0][1]), also=tuple(tunes[1:]), old_weight=float(setting)
    )
    fisherkit.merge(stage.world.base, tunes[0][0], stage.folder / "merged", chosen)
    stage.model = models.load(stage.folder / "merged", stage.world.size.device)


# LoRA: one adapter for all tasks, so that what is learnt is one low-rank delta in the end.

_LORA_RATE = 4.0
"""Share of the course's rate: adapters start at nothing, and are usually trained ten times faster than weights."""


def _lora(stage: Stage, setting: str) -> None:
    stage.model = _with_adapter(stage)
    _train(stage, rate=_LORA_RATE * float(setting), weights=_factors(stage.model))


def _lora_activation(stage: Stage, setting: str) -> None:
    _lora_under(stage, _activation_mask(stage.world, setting))


def _lora_shield(stage: Stage, setting: str) -> None:
    _lora_under(stage, shield_mask(stage.world, setting))


def _lora_under(stage: Stage, mask: Path) -> None:
    stage.model = model = _with_adapter(stage)
    watch: Watch = lambda optimizer: constrain(optimizer, model, mask, steps=1)  # noqa: E731
    _train(stage, rate=_LORA_RATE, weights=_factors(model), watch=watch)


def _with_adapter(stage: Stage) -> Any:
    from peft import LoraConfig, get_peft_model

    if stage.number:
        return stage.model
    torch.manual_seed(stage.seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(stage.model, config)


def _factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


# All of them.

LEARN: Mapping[str, Callable[[Stage, str], None]] = {
    "plain": _plain,
    "plain-all-weights": _plain_all_weights,
    "early-stop": _early_stop,
    "random-rows": _random_rows,
    "migu": _migu,
    "fggm": _fggm,
    "protect": _protect,
    "layer-scale": _layer_scale,
    "fisher-subspace": _fisher_subspace,
    "weight-subspace": _weight_subspace,
    "activation": _activation,
    "kron": _kron,
    "shield": _shield,
    "shield-onward": _shield_onward,
    "ewc": _ewc,
    "pull": _pull,
    "pull-fisher": _pull_fisher,
    "replay": _replay,
    "regmean-onward": _regmean_onward,
    "lora": _lora,
    "lora+activation": _lora_activation,
    "lora+shield": _lora_shield,
}
"""By name: learn one task in place."""


def save(model: Any, world: World, folder: Path) -> None:
    """As a checkpoint with its tokenizer; an adapter as an adapter."""
    model.save_pretrained(folder)
    world.chat.tokenizer.save_pretrained(folder)
    gc.collect()
