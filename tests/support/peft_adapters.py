"""Adapters as peft trains, saves and merges them; and what fisherkit makes of the same."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.lora.adapter import Adapter
from fisherkit.floats import widen

Floats = NDArray[np.float32]
LINEAR = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@contextmanager
def quiet() -> Iterator[None]:
    """What peft warns of is what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quiet()
def train(base: Path, folder: Path, *, embeddings: bool | str = "auto", **lora: Any) -> Path:
    """A saved adapter, all of whose tensors are random: the usual start, B = 0, changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.5 if "magnitude" in name else 0.0))
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def values(folder: Path) -> dict[str, Floats]:
    with ArrayReader(open_index(folder)) as reader:
        return {name: widen(reader.read(name), info.dtype) for name, info in reader.index.tensors.items()}


@quiet()
def merged(base: Path, adapter: Path, folder: Path) -> dict[str, Floats]:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return values(folder)


def tuned(base: Path, adapter: Path) -> dict[str, Floats]:
    """Every tensor of the base as the adapter makes it; what is touched must have changed, and the rest must not."""
    before = values(base)
    with Adapter.open(adapter, open_index(base)) as opened:
        after = {name: opened.tuned(name, weight) for name, weight in before.items()}
        changed = tuple(name for name in before if not np.array_equal(before[name], after[name]))
        assert opened.touched == changed
    assert_close(before, values(base), exactly=True)
    return after


def assert_close(found: dict[str, Floats], wanted: dict[str, Floats], *, exactly: bool = False) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == np.float32
        assert np.isfinite(found[name]).all()
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=0 if exactly else 1e-6, err_msg=name)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
