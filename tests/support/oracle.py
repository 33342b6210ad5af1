"""The slow obvious Fisher: a whole model in float64, one sample at a time, autograd, squared, averaged."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from fisherkit.prompts.dataset import Sample


def fisher(folder: Path, samples: Sequence[Sample], reduction: str = "mean") -> dict[str, Tensor]:
    """Fisher of every parameter, by checkpoint tensor name, float64 (float32 where the model insists on it)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    return fisher_of(model, samples, reduction)


def fisher_of(
    model: Any, samples: Sequence[Sample], reduction: str = "mean", *, token_types: bool = False
) -> dict[str, Tensor]:
    """Fisher of every parameter of a loaded model, by checkpoint tensor name.

    With ``token_types`` tokens before the first that counts are a prefix (type 0), all others are not (type 1).
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sample in samples:
        ids, counts = torch.tensor(sample.ids), torch.tensor(sample.counts)
        types = {"token_type_ids": (counts.cumsum(0) > 0).long()[None]} if token_types else {}
        logits = model(input_ids=ids[None], use_cache=False, **types).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")[counts[1:]]
        (losses.mean() if reduction == "mean" else losses.sum()).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad**2
        model.zero_grad(set_to_none=True)
    return revert_weight_conversion(model, {name: value / len(samples) for name, value in total.items()})


def moments(folder: Path, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means of x x^T and of g g^T over the tokens that reach each linear layer, by the name of its weight, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    tokens: dict[str, int] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).double()
            tokens[name] = tokens.get(name, 0) + len(x)
            sums[0][name] = sums[0].get(name, 0) + x.T @ x
            output.register_hook(add)

        def add(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).double()
            sums[1][name] = sums[1].get(name, 0) + g.T @ g

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(listen(f"{name}.weight"))
    for sample in samples:
        ids, counts = torch.tensor(sample.ids), torch.tensor(sample.counts)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, ids[1:], reduction="none")[counts[1:]].mean().backward()
    names = revert_weight_conversion(model, {name: torch.tensor(number) for number, name in enumerate(tokens)})
    spelled = {list(tokens)[int(number)]: name for name, number in names.items()}
    means = [{spelled[name]: value / tokens[name] for name, value in side.items()} for side in sums]
    return means[0], means[1]
