"""Muon (K. Jordan, 2024), with which the small base learns its tasks several times sooner than with AdamW.

The momentum of every matrix is brought near the closest matrix with orthonormal rows or columns before it is taken
as the step. Only the base is trained so: fine-tunes, which are what is compared, take AdamW.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the iteration x -> a x + b x^3 + c x^5, steep at zero and near 1 after five
_MOMENTUM = 0.95


class Muon(Optimizer):
    """For matrices; a step of rate r moves each by about r times the root of its larger size, in the spectral norm."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Matrices of one shape go through the iteration together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault(weight.shape, []).append(weight)
            for shape, weights in shapes.items():
                steps = orthogonal(torch.stack([self._momentum(weight) for weight in weights]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for weight, step in zip(weights, steps, strict=True):
                    weight.add_(step, alpha=-rate)

    def _momentum(self, weight: nn.Parameter) -> Tensor:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"].lerp_(weight.grad, 1 - _MOMENTUM)
        return torch.lerp(weight.grad, momentum, _MOMENTUM)  # Nesterov's


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, a, b] with all singular values near 1, and the same singular vectors."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    for _ in range(5):
        square = wide @ wide.mT
        wide = _A * wide + (_B * square + _C * square @ square) @ wide
    found: Tensor = wide if x.shape[1] <= x.shape[2] else wide.mT
    return found
