"""A soft subspace the slow way: after every step the change so far is divided in its directions, in float64."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from training_runs import basis, copies

from fisherkit.artefacts.mask_file import MaskEntry, header

Pulls = dict[str, tuple[Tensor, list[float], int]]  # by weight: directions float64, strengths, the axis they are of
PULL = 0.5


def strengths(pull: float, energies: Iterable[float], size: int) -> list[float]:
    """s_j = pull * sqrt(c_j / mean(c)), the mean over all channels."""
    found = list(energies)
    mean = sum(found) / size
    return [pull * math.sqrt(energy / mean) if mean > 0 else 0.0 for energy in found]


def drawn(weight: Tensor, start: Tensor, pull: tuple[Tensor, list[float], int], pace: float = 1.0) -> Tensor:
    """start + D - D P, P the matrix of what is taken away: sum_j p s_j / (1 + p s_j) q_j q_j^T; float64."""
    q, s, axis = pull
    taken = torch.zeros(len(q), len(q), dtype=torch.float64)
    for number, strength in enumerate(s):
        taken += pace * strength / (1 + pace * strength) * torch.outer(q[:, number], q[:, number])
    change = weight.detach().double() - start.double()
    return start.double() + change - (change @ taken if axis == 1 else taken @ change)


def write(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    sides: str = "V",
    rank: int = 4,
    pull: Any = PULL,
    energies: Callable[[int], Tensor] = lambda rank: torch.linspace(3.0, 0.1, rank),
    zeros: int = 0,
) -> Pulls:
    """A soft subspace of random directions, of the axis that ``sides`` (one letter for all, or per weight) says.

    Hard where ``pull`` is None. ``zeros`` columns of zeros are put behind the directions.
    """
    stored, entries, found = {}, {}, {}
    for number, (name, weight) in enumerate(weights.items()):
        side = sides[number % len(sides)]
        axis = "UV".index(side)
        q, c = basis(weight.shape[axis], rank, seed=number), energies(rank)
        stored[f"{name}.{side}"] = nn.functional.pad(q, (0, zeros)).contiguous()
        stored[f"{name}.S"] = nn.functional.pad(c, (0, zeros))
        entries[name] = MaskEntry(tuple(weight.shape))
        found[name] = (q.double(), strengths(pull or 0.0, c.tolist(), len(q)), axis)
    safetensors.torch.save_file(stored, path)
    described = header(
        "subspace", path.name, entries, direction="protect", options={"pull": pull, "pull_per": "course"}
    )
    path.with_suffix(".json").write_text(json.dumps(described))
    return found


def of_file(path: Path, pull: float) -> Pulls:
    """What is in a file, as the oracle wants it."""
    stored = safetensors.torch.load_file(path)
    found = {}
    for part, q in stored.items():
        name, _, side = part.rpartition(".")
        if side != "S":
            found[name] = (q.double(), strengths(pull, stored[f"{name}.S"].tolist(), len(q)), "UV".index(side))
    return found


def three_weights(seed: int = 0) -> nn.ParameterDict:
    """Two matrices to be held and one that is not."""
    generator = torch.Generator().manual_seed(seed)
    return nn.ParameterDict({n: torch.randn(12, 10, generator=generator) for n in ("one", "other", "free")})


def held(model: nn.ParameterDict) -> dict[str, Tensor]:
    return {name: model[name] for name in ("one", "other")}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on gradients that do not depend on the weights, so that what is compared stays comparable."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name].detach().double(),
            tensor.detach().double(),
            rtol=0,
            atol=atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


class ByHand:
    """The same training with the formula in place of fisherkit: steps freely, then writes what the oracle says."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, pulls: Pulls) -> None:
        self._model, self._optimizer, self._pulls = model, optimizer, pulls
        self._start = copies(dict(model.named_parameters()))

    def step(self, seed: int, pace: float = 1.0) -> None:
        step(self._model, self._optimizer, seed)
        self.draw(pace)

    @torch.no_grad()
    def draw(self, pace: float = 1.0) -> None:
        for name, parameter in self._model.named_parameters():
            if name in self._pulls:
                parameter.copy_(drawn(parameter, self._start[name], self._pulls[name], pace))
