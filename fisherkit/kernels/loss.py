"""Loss of one sample, l_n = -log p of its counted tokens, their mean or their sum.

Axes: T tokens, V vocabulary. The token at position t is predicted by the logits at t-1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fisherkit.kernels.devices import wide_device


def sample_loss(logits: Tensor, labels: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Return the negative log-likelihood of the counted tokens, float32 whatever the logits are.

    Args:
        logits: [T, V], any float dtype.
        labels: [T] token ids.
        counted: [K] numbers of the tokens that count, 1 and more. As flags they would have to be looked for, and a
            device waited for.
        reduction: ``mean`` over the counted tokens, or ``sum``.
    """
    before = logits.index_select(0, counted - 1)
    return F.cross_entropy(before.float(), labels.index_select(0, counted), reduction=reduction)


@torch.no_grad()
def sample_labels(logits: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Draw labels [T] from the model's own distribution at every position (true Fisher, one draw).

    The draw inverts the cumulative distribution at uniforms from a generator on the CPU, so that a sample's labels
    depend on the seed alone and not on the device or on its neighbours.

    Args:
        logits: [T, V], any float dtype.
        labels: [T] token ids; the first stays.
        seed: of the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = wide_device(logits.device)
    uniform = torch.rand(len(labels) - 1, 1, generator=generator, dtype=torch.float64).to(wide, non_blocking=True)
    drawn = labels.clone()
    for start in range(0, len(labels) - 1, 64):  # float64 of a few rows at a time: vocabularies are large
        rows = slice(start, min(start + 64, len(labels) - 1))
        cumulative = logits[rows].to(wide).double().softmax(-1).cumsum(-1)
        found = torch.searchsorted(cumulative, uniform[rows]).squeeze(1).clamp_max(logits.shape[-1] - 1)
        drawn[rows.start + 1 : rows.stop + 1] = found.to(logits.device)
    return drawn
