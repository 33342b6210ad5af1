"""One cell of the matrix of benchmarks.clients: a short run of one optimizer under one rule, against its formula.

The oracles are written out here in float64, apart from the package: they share no code with what they check.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fisherkit.errors import TrainingError
from fisherkit.training import constrain

RULES = ("mask", "subspace", "shield", "scale")
STEPS, LAYERS, RANK, PULL, SCALE = 20, 3, 8, 0.5, 0.1
Params = list[nn.Parameter]
MakeOptimizer = Callable[[Params, nn.Module], Any]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Client:
    """An optimizer that people use.

    Attributes:
        package: that it comes from.
        make: from the parameters and the model.
        refused: no rule can hold it.
        closure: it wants the loss computed inside of its step.
    """

    package: str
    make: MakeOptimizer
    refused: bool = False
    closure: bool = False


def cell(client: Client, rule: str, dtype: torch.dtype, *, lora: bool, folder: Path) -> str:
    """Return ``holds``, ``rounds``, a share that leaks, ``refused``, or ``-`` where it cannot train without a rule."""
    with contextlib.redirect_stdout(sys.stderr):  # some optimizers say what they do
        return _cell(client, rule, dtype, lora, folder)


def _cell(client: Client, rule: str, dtype: torch.dtype, lora: bool, folder: Path) -> str:
    try:
        free = _run(client, None, dtype, lora, folder, steps=2)
    except Exception as error:  # whatever it is: no rule has a part in it
        free = None
        if not client.refused:
            return f"- ({type(error).__name__})"
    try:
        before, after = _run(client, rule, dtype, lora, folder, steps=STEPS if rule in ("mask", "subspace") else 2)
    except TrainingError:
        return "refused"
    if rule == "mask":
        return _frozen(before, after)
    if rule == "subspace":
        return _outside(before, after, lora)
    assert free is not None
    return _as_said(_expected(rule, free, lora), after, free, dtype)


def make_model(dtype: torch.dtype, *, lora: bool = False) -> Any:
    """Return a small Llama, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config).to(dtype).train()
    if not lora:
        return model
    peft = importlib.import_module("peft")
    options = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    return peft.get_peft_model(model, options, autocast_adapter_dtype=False)


def directions(size: int) -> Tensor:
    """Return RANK orthonormal columns [size, RANK], the same at every call."""
    return torch.linalg.qr(torch.randn(size, RANK, generator=torch.Generator().manual_seed(size)))[0].contiguous()


def _run(
    client: Client, rule: str | None, dtype: torch.dtype, lora: bool, folder: Path, *, steps: int
) -> tuple[State, State]:
    """Return what is trained before the first held step and after the last; one free step warms the optimizer."""
    model = make_model(dtype, lora=lora)
    params = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim == 2]
    optimizer = client.make(params, model)
    if rule and client.refused:
        _hold(optimizer, model, rule, lora, folder)
    for step in range(steps):
        if step == 1:
            before = _state(model)
            if rule:
                _hold(optimizer, model, rule, lora, folder)
        torch.manual_seed(step)
        ids = torch.randint(0, 64, (2, 16))

        def closure(ids: Tensor = ids) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss

        with torch.enable_grad():
            if not client.closure:
                closure()
            optimizer.step(*((closure,) if client.closure else ()))
    return before, _state(model)


def _state(model: nn.Module) -> State:
    """Return matrices of the layers and LoRA factors by their plain names, in float64."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach().double().clone()
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.ndim == 2
    }


def _targets(state: Mapping[str, Tensor], lora: bool) -> dict[str, Tensor]:
    """Return the weights that the rules speak of: those with an adapter, or all."""
    adapted = {name.split(".lora_A")[0] + ".weight" for name in state if ".lora_A" in name}
    return {name: own for name, own in state.items() if ".lora_" not in name and (not lora or name in adapted)}


def _hold(optimizer: Any, model: nn.Module, rule: str, lora: bool, folder: Path) -> None:
    weights = _targets(_state(model), lora)
    if rule == "scale":
        constrain(optimizer, model, [1.0] * (LAYERS - 1) + [SCALE**-2])
    elif rule == "mask":
        constrain(optimizer, model, {name: _flags(name, weight) for name, weight in weights.items()})
    elif rule == "subspace":
        outputs = {f"{name}.U": directions(weight.shape[0]) for name, weight in weights.items()}
        inputs = {f"{name}.V": directions(weight.shape[1]) for name, weight in weights.items()}
        constrain(optimizer, model, outputs | inputs)
    else:
        held: State = {}
        for name, weight in weights.items():
            held |= {f"{name}.V": directions(weight.shape[1]), f"{name}.S": torch.arange(RANK, 0, -1).float()}
        save_file(held, folder / "shield.safetensors")
        constrain(optimizer, model, folder / "shield.safetensors", pull=PULL, steps=1)


def _flags(name: str, weight: Tensor) -> Tensor:
    """Return rows that may change for some weights, single entries for the others."""
    shape = (weight.shape[0], 1) if ".mlp." in name else tuple(weight.shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(name))) < 0.3


# What is expected, and what was found


def _frozen(before: State, after: State) -> str:
    """Count frozen entries whose bits differ: float64 holds every float32 and bfloat16 exactly."""
    changed = sum(
        int((own.view(torch.int64) != after[name].view(torch.int64))[~_flags(name, own).expand_as(own)].sum())
        for name, own in before.items()
    )
    return f"{changed} entries changed" if changed else "holds"


def _outside(before: State, after: State, lora: bool) -> str:
    """Return the largest share of a weight's change that lies in its subspace; of LoRA, of the whole delta B A."""
    shares = []
    for name, weight in _targets(after, lora).items():
        stem = name.removesuffix(".weight")
        if lora:
            change = after[f"{stem}.lora_B.default.weight"] @ after[f"{stem}.lora_A.default.weight"]
        else:
            change = weight - before[name]
        inside = (directions(change.shape[0]).double().mT @ change, change @ directions(change.shape[1]).double())
        shares.append(max(float(part.norm() / change.norm()) for part in inside))
    return "holds" if max(shares) < 1e-5 else f"{100 * max(shares):.2g} %"


def _expected(rule: str, free: tuple[State, State], lora: bool) -> State:
    """Return what the formula makes of a free step, in float64; what no rule speaks of stays as the step made it."""
    before, after = free
    made = dict(after)
    if rule == "scale":
        last = f".layers.{LAYERS - 1}."
        return {n: before[n] + (SCALE if last in n else 1.0) * (after[n] - before[n]) for n in after}
    for name, weight in _targets(after, lora).items():
        key = name.removesuffix(".weight") + ".lora_A.default.weight" if lora else name
        q = directions(weight.shape[1]).double()
        energies = torch.arange(RANK, 0, -1).double()
        strengths = PULL * (energies / (energies.sum() / weight.shape[1])).sqrt()
        moved = after[key] if lora else after[key] - before[key]  # B A began as nothing
        made[key] = after[key] - (moved @ q * (strengths / (1 + strengths))) @ q.mT
    return made


def _as_said(expected: State, after: State, free: tuple[State, State], dtype: torch.dtype) -> str:
    """Return ``holds`` to 1e-3 of the update in float32, ``rounds`` within a rounding of every weight in bfloat16."""
    if dtype is torch.float32:
        error = _norm(after[n] - own for n, own in expected.items())
        moved = _norm(free[1][n] - own for n, own in free[0].items())
        return "holds" if error < 1e-3 * moved else f"off by {100 * error / moved:.2g} %"
    worst = max(float(((after[n] - own).abs() / _spacing(own)).max()) for n, own in expected.items())
    return "rounds" if worst <= 1.01 else f"off by {worst:.2g} roundings"


def _norm(parts: Iterable[Tensor]) -> float:
    return sum(float(part.square().sum()) for part in parts) ** 0.5


def _spacing(exact: Tensor) -> Tensor:
    """Return the spacing of bfloat16 at each entry; entries near zero count as a hundredth of the matrix's mean size.

    The rule computes in float32, whose error goes with the size of whole rows.
    """
    size = exact.abs().clamp_min(0.01 * float(exact.square().mean().sqrt()) + 1e-30)
    return torch.exp2(torch.floor(torch.log2(size)) - 7)
