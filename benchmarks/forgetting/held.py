"""Methods that hold training to a mask, a subspace, a shield or layer scales, fisherkit's own; LoRA is peft's."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fisherkit
from benchmarks.forgetting import model as models
from benchmarks.forgetting.methods import WITHOUT_MASKS, Stage, Watch, save, train
from benchmarks.forgetting.world import Look, World, write_prompts
from fisherkit import ExtractOptions, MaskOptions, MergeOptions
from fisherkit.training import MIGU, constrain

_LORA_RATE = 2.0
"""Share of a setting's rate that LoRA is given: its factors start at nothing, and want larger steps than weights."""


def _under(stage: Stage, mask: Path, **options: Any) -> None:
    train(stage, watch=_held(stage, mask, **options))


def _held(stage: Stage, mask: Path, **options: Any) -> Watch:
    return lambda optimizer: constrain(optimizer, stage.model, mask, steps=stage.course.peak_steps, **options)


# Masks; the strength is the share of rows that may change.


def _random_rows(stage: Stage) -> None:
    """As many rows as FGGM's, drawn anew for every task."""
    keep, seed = stage.setting.strength, 100 * stage.seed + stage.number
    options = MaskOptions(preset="fggm", keep=float(keep), score="random", seed=seed)
    _under(stage, stage.world.mask(f"random-{keep}-{seed}", options))


def _migu(stage: Stage) -> None:
    """The strength is the share of rows that rest at each step."""
    train(stage, watch=lambda optimizer: MIGU(stage.strength).attach(optimizer, stage.model))


def _fggm(stage: Stage, aggregate: Any = "input") -> None:
    """From the Fisher of the new task's own items at the current weights; for the first task too."""
    mask = stage.folder / "mask.safetensors"
    fisherkit.mask(_new_fisher(stage), mask, MaskOptions(train="top", aggregate=aggregate, keep=stage.strength))
    _under(stage, mask)


def _fggm_output(stage: Stage) -> None:
    """With scores over outputs: columns."""
    _fggm(stage, "output")


def _new_fisher(stage: Stage) -> Path:
    """Return the Fisher of the new items; that of a first task is the same for all settings."""

    def make(folder: Path) -> None:
        save(stage.model, stage.world, folder / "now")
        prompts = write_prompts(folder / "prompts.jsonl", stage.items)
        options = stage.world.extract_options()
        fisherkit.extract(folder / "now", prompts, folder / "fisher.safetensors", options)

    if stage.number == 0:
        return stage.world.made(f"new-{stage.seed}-{stage.name}", make) / "fisher.safetensors"
    make(stage.folder)
    return stage.folder / "fisher.safetensors"


def _protect(stage: Stage) -> None:
    """Freeze the top of the base's Fisher; the strength is the share that is frozen."""
    options = MaskOptions(protect="top", aggregate="none", keep=stage.strength)
    _under(stage, stage.world.mask(f"protect-{stage.setting.strength}", options))


def _layer_scale(stage: Stage) -> None:
    """Layers with more of the base's Fisher move less; the strength is the power."""
    _under(stage, _layers(stage.world), power=stage.strength)


def _layers(world: World) -> Path:
    return world.fisher("prompts").with_name("layer_importance.json")


# Subspaces of the base; the strength is a share of its width, or of the energy.


def _fisher_subspace(stage: Stage) -> None:
    """Singular modes of the Fisher of prompts alone, on both sides, as the card of Gemma 4 Masks describes."""
    share = stage.setting.strength
    options = MaskOptions(svd_rank=stage.world.rank(float(share)), basis="fisher")
    _under(stage, stage.world.mask(f"fisher-subspace-{share}", options, "prompts"))


def _weight_subspace(stage: Stage) -> None:
    share, weights = stage.setting.strength, str(stage.world.base)
    options = MaskOptions(svd_rank=stage.world.rank(float(share)), basis="weight", weights=weights)
    _under(stage, stage.world.mask(f"weight-subspace-{share}", options))


def _activation(stage: Stage, basis: Any = "activation") -> None:
    """Updates stay out of the directions of the layers' inputs (GPM)."""
    energy = stage.setting.strength
    options = MaskOptions(svd_energy=float(energy), basis=basis)
    _under(stage, stage.world.mask(f"{basis}-{energy}", options))


def _kron(stage: Stage) -> None:
    """And of the gradients at their outputs."""
    _activation(stage, "kron")


def _shield(stage: Stage, look: Look = "data") -> None:
    """Drawn back to the base, whatever was learnt since; the strength is the pull."""
    _under(stage, shield_mask(stage.world, stage.setting.strength, look), anchor=stage.world.base)


def _shield_text(stage: Stage) -> None:
    """With plain text among the probes."""
    _shield(stage, "text")


def _shield_onward(stage: Stage) -> None:
    """Drawn back to where the task began, as when a fine-tune is fine-tuned."""
    _under(stage, shield_mask(stage.world, stage.setting.strength))


def shield_mask(world: World, pull: str, look: Look = "data") -> Path:
    """Return the preset's mask, pulling so hard."""
    return world.mask(f"shield-{pull}", MaskOptions(preset="shield", pull=float(pull)), look)


def _regmean_onward(stage: Stage) -> None:
    """After every task, the solve over base and all fine-tunes so far is where the next task starts."""
    train(stage)
    place = stage.folder.parent / f"tune-{stage.number}"
    save(stage.model, stage.world, place)
    prompts, new = write_prompts(place / "new.jsonl", stage.items), place.with_suffix(".safetensors")
    options = ExtractOptions(statistics="inputs", limit=stage.world.size.probes, device=stage.world.size.device)
    fisherkit.extract(place, prompts, new, options)
    tunes = stage.kept.setdefault("tunes", [])
    tunes.append((str(place), new))
    chosen = MergeOptions(regmean=(stage.world.fisher(), tunes[0][1]), also=tuple(tunes[1:]), old_weight=stage.strength)
    fisherkit.merge(stage.world.base, tunes[0][0], stage.folder / "merged", chosen)
    stage.model = models.load(stage.folder / "merged", stage.world.size.device)


# LoRA: one adapter for all tasks, so that what is learnt is one low-rank delta in the end.


def _lora(stage: Stage) -> None:
    """The strength is the rank."""
    _train_lora(stage, int(stage.strength))


def _lora_shield(stage: Stage) -> None:
    _train_lora(stage, 8, shield_mask(stage.world, stage.setting.strength))


def _lora_layer_scale(stage: Stage) -> None:
    """As the card of Gemma 4 Masks describes; the strength is the power."""
    _train_lora(stage, 8, _layers(stage.world), power=stage.strength)


def _train_lora(stage: Stage, rank: int, mask: Path | None = None, **options: Any) -> None:
    from peft import LoraConfig, get_peft_model

    if not stage.number:
        torch.manual_seed(stage.seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        stage.model = get_peft_model(stage.model, config)
    watch: Watch = (lambda optimizer: None) if mask is None else _held(stage, mask, **options)
    train(stage, rate=_LORA_RATE, weights=_factors(stage.model), watch=watch)


def _factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


LEARN: Mapping[str, Callable[[Stage], None]] = {
    **WITHOUT_MASKS,
    "random-rows": _random_rows,
    "migu": _migu,
    "fggm": _fggm,
    "fggm-output": _fggm_output,
    "protect": _protect,
    "layer-scale": _layer_scale,
    "fisher-subspace": _fisher_subspace,
    "weight-subspace": _weight_subspace,
    "activation": _activation,
    "kron": _kron,
    "shield": _shield,
    "shield-text": _shield_text,
    "shield-onward": _shield_onward,
    "regmean-onward": _regmean_onward,
    "lora": _lora,
    "lora+shield": _lora_shield,
    "lora+layer-scale": _lora_layer_scale,
}
"""By name: learn one task in place."""
