"""What cannot constrain an optimizer is refused before the first step, with what to do instead."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_files import write_mask, write_subspace
from torch import nn
from training_runs import (
    llama,
    masks,
    matrices,
)

import fisherkit
from fisherkit.errors import CheckpointError, OptionError, TrainingError
from fisherkit.training.optimizer_hooks import constrain


def refused(mask: Any, model: nn.Module | None = None, optimizer: Any = None, **options: Any) -> None:
    model = model if model is not None else llama()
    constrain(optimizer or torch.optim.AdamW(model.parameters()), model, mask, **options)


def test_a_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"1 of 2 weights.*'model.layers.9"):
        refused({name: torch.ones(48, 1, dtype=torch.bool), "model.layers.9.x.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match=r"\[47, 1\].*\[48, 32\]"):
        refused({name: torch.ones(47, 1, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match=r"6 of 6 weights"):
        refused(write_mask(tmp_path / "m.safetensors"))
    with pytest.raises(CheckpointError, match=rf"modes of {name} .*\[48, 32\]"):
        refused({f"{name}.U": torch.eye(32)})
    with pytest.raises(CheckpointError, match=r"layer 3\b.*3 layers"):
        refused([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": torch.ones(3)}, "'w'.*no bool tensor"),
        ({"w": torch.ones(3, dtype=torch.uint8)}, "'w'.*no bool tensor"),
        ({}, "not a layer importance"),
        ([], "not a layer importance"),
        ({"0": "x"}, "not a layer importance"),
        ([1.0, math.nan, 2.0], "layer 1 .*nan"),
        ([1.0, -1.0, 2.0], "layer 1 .*-1.0"),
        (Path("absent.safetensors"), "no such file"),
        (Path("absent.json"), "no such file"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        refused(mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parity": "papers"}, "parity .*'paper'.*'papers'"),
        ({"power": -1}, "power .*0 or more"),
        ({"floor": 1.5}, "floor .*0 and 1"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        refused([1.0, 2.0, 3.0], **options)


def test_an_optimizer_that_keeps_copies_of_its_own_is_refused() -> None:
    model = llama()
    copied = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in model.parameters()])
    with pytest.raises(TrainingError, match="none of its 21 weights"):
        refused(masks(matrices(model)), model, copied)
    with pytest.raises(TrainingError, match="no parameter of any layer"):
        refused([1.0, 2.0, 3.0], model, copied)
    with pytest.raises(TrainingError, match=r"str .*optimizer"):
        refused(masks(matrices(model)), model, "adamw")


def test_deepspeed_and_fsdp1_are_refused_with_what_to_do_instead() -> None:
    model = llama()
    flags = masks(matrices(model))
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = model
    fsdp = type("FullyShardedDataParallel", (nn.Module,), {"__module__": "torch.distributed.fsdp.fully_sharded"})()
    fsdp.module = model
    wrapper = type("DeepSpeedOptimizerWrapper", (torch.optim.AdamW,), {"__module__": "accelerate.utils.deepspeed"})
    with pytest.raises(TrainingError, match=r"DeepSpeed.*FSDP2"):
        refused(flags, engine)
    with pytest.raises(TrainingError, match=r"DeepSpeed"):
        refused(flags, model, wrapper(model.parameters()))
    with pytest.raises(TrainingError, match=r"FSDP1.*FSDP2"):
        refused(flags, fsdp)
    next(model.parameters()).ds_id = 0
    with pytest.raises(TrainingError, match="DeepSpeed"):
        refused(flags, model)


def test_a_subspace_is_no_mapping_of_masks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a subspace, not a mask"):
        fisherkit.load_mask(write_subspace(tmp_path / "s.safetensors"))


def test_the_package_imports_no_torch_before_it_is_used() -> None:
    code = "import sys, fisherkit.training; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
