"""The slow obvious Fisher: a whole model in float64, one sample at a time, autograd, squared, averaged."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from fisherkit.engine.prompts import Sample


def fisher(folder: Path, samples: Sequence[Sample], reduction: str = "mean") -> dict[str, Tensor]:
    """Fisher of every parameter, by checkpoint tensor name, float64 (float32 where the model insists on it)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sample in samples:
        ids, counts = torch.tensor(sample.ids), torch.tensor(sample.counts)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")[counts[1:]]
        (losses.mean() if reduction == "mean" else losses.sum()).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad**2
        model.zero_grad(set_to_none=True)
    return revert_weight_conversion(model, {name: value / len(samples) for name, value in total.items()})
