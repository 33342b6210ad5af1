"""Short training runs on a tiny Llama, and masks for it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor, nn

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "adafactor": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False, weight_decay=0.1),
    "torch-adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, weight_decay=0.1, momentum=0.9),
    "unknown": lambda p: Unknown(p, lr=1e-2),
    "nested": lambda p: Nested(p, lr=1e-2, weight_decay=0.1),
}


class Unknown(torch.optim.Optimizer):
    """An optimizer that nobody has heard of: sign descent with a counter in its groups."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign() + 0.1 * parameter, alpha=-group["lr"])


class Nested(torch.optim.AdamW):
    """An optimizer whose step shrinks the weights and calls the step of its base class, hooks and all."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)
        super().step()


def llama(architecture: str = "llama") -> Any:
    """A model that trains."""
    return tiny.build(architecture).train()


def batch(seed: int = 0, rows: int = 2, tokens: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, tiny.VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, *, clip: float | None = None) -> None:
    for step in range(steps):
        model(**batch(step)).loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of the blocks, by name."""
    return {name: p for name, p in model.named_parameters() if p.ndim > 1 and ".layers." in name}


def masks(weights: Mapping[str, Tensor], kind: str = "rows", keep: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Random masks, broadcastable to the weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"rows": lambda s: (*s[:-1], 1), "columns": lambda s: (1, *s[1:]), "elements": lambda s: s}
    return {
        name: torch.rand(shapes[kind](tuple(weight.shape)), generator=generator) < keep
        for name, weight in weights.items()
    }


def copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8).reshape(*tensor.shape, -1)


def check_frozen(before: Mapping[str, Tensor], after: Mapping[str, Tensor], flags: Mapping[str, Tensor]) -> None:
    """Entries that may not change have the same bits, the others mostly do not."""
    for name, own in flags.items():
        changed = (bits(before[name]) != bits(after[name])).any(-1)
        free = own.expand(changed.shape)
        assert not changed[~free].any(), name
        assert not free.any() or changed[free].float().mean() > 0.5, name


def basis(rows: int, rank: int, seed: int = 0) -> Tensor:
    """Orthonormal columns [rows, rank]."""
    return torch.linalg.qr(torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)))[0]


def subspaces(weights: Mapping[str, Tensor], rank: int = 4, sides: str = "UV") -> dict[str, Tensor]:
    parts = {}
    for name, weight in weights.items():
        if "U" in sides:
            parts[f"{name}.U"] = basis(weight.shape[-2], rank)
        if "V" in sides:
            parts[f"{name}.V"] = basis(weight.shape[-1], rank, seed=1)
    return parts


def step_at_random(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()


class Wrapper(nn.Module):
    """What DDP does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)
