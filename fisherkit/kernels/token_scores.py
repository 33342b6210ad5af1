"""Losses and greedy hits of tokens, and how far two models' distributions lie apart.

Axes: R tokens to be predicted, V vocabulary. Logits come in any float dtype; all is computed in float32 and summed in
float64. A caller bounds R * V: a few tensors of that size are made.
"""

import torch
from torch import Tensor

from fisherkit.kernels.devices import wide_device


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p of each label [R] in nats, float64, and whether it is the most likely token [R].

    Of equally likely tokens the first is taken, as greedy decoding does.

    Args:
        logits: [R, V].
        labels: [R] token ids.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    losses = -log_p.gather(1, labels[:, None]).squeeze(1).to(wide_device(logits.device)).double()
    return losses, logits.argmax(-1) == labels


def divergence(first: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(first || other) of each token's distribution [R] in nats, float64, and whether both agree on it [R].

    KL(p || q) = sum_v p_v (log p_v - log q_v). They agree where the same token is the most likely one. Vocabularies
    that are padded to another size are compared on the tokens that both have.

    Args:
        first: logits [R, V].
        other: logits [R, V'].
    """
    common = min(first.shape[-1], other.shape[-1])
    log_p = torch.log_softmax(first[:, :common].float(), -1)
    log_q = torch.log_softmax(other[:, :common].float(), -1)
    p = log_p.exp()
    terms = p.mul_(log_p.sub_(log_q))
    # A token that both rule out by -inf adds nothing, and rounding alone can make the sum negative.
    found = terms.to(wide_device(terms.device)).nansum(-1, dtype=torch.float64).clamp_min_(0.0)
    return found, first[:, :common].argmax(-1) == other[:, :common].argmax(-1)
