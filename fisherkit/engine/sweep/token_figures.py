"""Figures of every token that counts: its loss, whether it is the likeliest, and how far two models are apart on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherkit.engine.sweep.last_rows import LastRows
from fisherkit.kernels.token_scores import divergence, token_losses


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Axes: N tokens that count, over all samples in order. On the CPU.

    Attributes:
        loss: [N] -log p in nats, float64.
        hit: [N] whether the token is the likeliest one.
        kl: [N] KL(first || this) in nats, float64; None where there is nothing to compare with.
        agreed: [N] whether both models find the same token likeliest.
    """

    loss: Tensor
    hit: Tensor
    kl: Tensor | None
    agreed: Tensor | None


def token_figures(rows: LastRows, first: LastRows | None, track: Callable[[int, int], None]) -> TokenFigures:
    """Take a model's rows to figures, a piece of logits at a time.

    Args:
        rows: of the model.
        first: of the model that it is compared with, of the same tokens.
        track: progress in tokens, called with done and total.
    """
    total = len(rows.labels)
    parts: list[list[Tensor]] = []
    for start in range(0, total, rows.chunk):
        stop = min(start + rows.chunk, total)
        logits = rows.logits(start, stop)
        found = [*token_losses(logits, rows.labels[start:stop].to(logits.device))]
        if first is not None:
            found += divergence(first.logits(start, stop), logits)
        parts.append([figure.cpu() for figure in found])
        track(stop, total)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return TokenFigures(
        loss=columns[0], hit=columns[1], kl=columns[2] if first else None, agreed=columns[3] if first else None
    )
