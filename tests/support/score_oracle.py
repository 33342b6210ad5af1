"""The slow obvious score: transformers' own loss of one sample at a time, and distributions in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fisherkit.prompts.dataset import Sample


def load(folder: Path) -> Any:
    """A model in float32, as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


@torch.no_grad()
def loss(model: Any, sample: Sample) -> float:
    """What the model itself says its loss is: nats, the mean over the tokens that count."""
    ids = torch.tensor([sample.ids])
    counts = torch.tensor([sample.counts])
    return float(model(input_ids=ids, labels=torch.where(counts, ids, -100)).loss)


@torch.no_grad()
def log_p(model: Any, sample: Sample) -> Tensor:
    """Log-probabilities [n, V] at the places of the tokens that count, float64."""
    logits = model(input_ids=torch.tensor([sample.ids])).logits[0, :-1].double()
    return logits.log_softmax(-1)[list(sample.counts[1:])]


@dataclass(frozen=True)
class Figures:
    """Of one sample."""

    loss: float
    accuracy: float
    exact: bool
    kl: float
    agreement: float


def figures(first: Any, model: Any, sample: Sample) -> Figures:
    """Every figure of a sample, one after the other as they are defined."""
    labels = torch.tensor([token for token, counts in zip(sample.ids, sample.counts, strict=True) if counts])
    one, other = log_p(first, sample), log_p(model, sample)
    hits = other.argmax(-1) == labels
    return Figures(
        loss=loss(model, sample),
        accuracy=float(hits.double().mean()),
        exact=bool(hits.all()),
        kl=float((one.exp() * (one - other)).sum(-1).mean()),
        agreement=float((one.argmax(-1) == other.argmax(-1)).double().mean()),
    )


def token_mean(losses: Sequence[float], samples: Sequence[Sample]) -> float:
    """Mean over all tokens that count, from the means of samples."""
    nats = sum(one * sample.loss_tokens for one, sample in zip(losses, samples, strict=True))
    return nats / sum(sample.loss_tokens for sample in samples)
