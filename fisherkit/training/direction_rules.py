"""Rules from directions: a hard subspace that updates stay out of, or a soft one that weights are drawn back in.

Both walk the weights of a subspace in the same way: LoRA factors are held one by one, a parameter once for all weights
that lie in it (the experts of a fused one). What differs is a class each.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from fisherkit.errors import TrainingError
from fisherkit.training.adapters import LoraAdapter
from fisherkit.training.mask_input import Basis, Constraint, Pull
from fisherkit.training.names import Names, Target
from fisherkit.training.rules import Rows, Rule, project, pull, span
from fisherkit.training.shards import is_sharded

_FROM_WEIGHT = ("pissa", "olora", "corda", "loftq")
"""Ways of peft to begin LoRA with what it takes out of the weight, so that B A is not nothing."""
_Part = TypeVar("_Part")
_Factors = tuple[nn.Parameter, nn.Parameter, tuple[int, ...]]


class DirectionRules(ABC, Generic[_Part]):
    """Maker of the rules that directions ask of the weights of one model.

    Args:
        names: of the model.
        constraint: a subspace, hard or soft.
        trains: whether the optimizer updates a parameter.
    """

    def __init__(self, names: Names, constraint: Constraint, trains: Callable[[nn.Parameter], bool]) -> None:
        self.names = names
        self.constraint = constraint
        self.trains = trains

    def make(self, targets: Mapping[str, Target]) -> list[Rule]:
        """Make rules for the adapters on every weight, then one per trained parameter, of all weights that lie in it.

        Raises:
            TrainingError: an adapter or a parameter that directions cannot hold.
        """
        rules: list[Rule] = []
        parts: dict[nn.Parameter, list[_Part]] = {}
        for name, target in targets.items():
            if self.names.has_expert_lora(target):
                raise TrainingError(
                    f"{self.constraint.label}: {name} has LoRA on fused experts, whose factors a subspace cannot hold"
                )
            for adapter in self.names.lora_of(target):
                factors = self._factors(adapter, name)
                if factors is not None:
                    rules += self.of_adapter(adapter, name, factors)
            if self.trains(target.parameter):
                self._refuse_part(name, target)
                parts.setdefault(target.parameter, []).append(self.part(name, target))
        return rules + [self.of_parameter(parameter, own) for parameter, own in parts.items()]

    @abstractmethod
    def of_adapter(self, adapter: LoraAdapter, name: str, factors: _Factors) -> list[Rule]:
        """Make the rules of a LoRA adapter on the weight ``name``."""

    @abstractmethod
    def part(self, name: str, target: Target) -> _Part:
        """Return what one weight asks of the parameter it lies in."""

    @abstractmethod
    def of_parameter(self, parameter: nn.Parameter, parts: Sequence[_Part]) -> Rule:
        """Make the rule of a parameter from what its weights ask."""

    def _factors(self, adapter: LoraAdapter, name: str) -> _Factors | None:
        """Return A, B and the weight's shape, fit to be held to directions; None where neither is trained."""
        if not any(self.trains(factor) for factor in adapter.factors):
            return None
        label = self.constraint.label
        if adapter.magnitude is not None:
            raise TrainingError(
                f"{label}: {name} has a DoRA adapter, whose magnitudes scale whole rows out of any subspace; "
                "use LoRA without use_dora"
            )
        if adapter.begun.lower().startswith(_FROM_WEIGHT):
            raise TrainingError(
                f"{label}: {name} has LoRA that was begun from the weight itself (init_lora_weights="
                f"{adapter.begun!r}), which a subspace would take out of the model; use init_lora_weights=True"
            )
        if adapter.a is None or adapter.b is None or adapter.shape is None:
            raise TrainingError(f"{label}: the adapter of {adapter.module} lacks a LoRA factor")
        return adapter.a, adapter.b, adapter.shape

    def _refuse_part(self, name: str, target: Target) -> None:
        if target.piece.expert is not None and is_sharded(target.parameter):
            raise TrainingError(
                f"{self.constraint.label}: {name} is an expert of {target.name}, which FSDP2 spreads over processes, "
                "so it cannot be projected alone; train unsharded, or apply the subspace with `fisherkit merge "
                "--subspace`"
            )


class ProjectionRules(DirectionRules[tuple[Rows, Basis]]):
    """Updates stay out of a subspace."""

    def of_adapter(self, adapter: LoraAdapter, name: str, factors: _Factors) -> list[Rule]:
        """Take what lies in U out of B, and in V out of A; the other way round for a weight stored as [in, out]."""
        assert self.constraint.basis is not None
        a, b, shape = factors
        u, v = self.constraint.basis(name, shape)
        outputs, inputs = (v, u) if adapter.transposed else (u, v)
        rules = []
        if outputs is not None:
            rules.append(span(b, outputs, over=0))
        if inputs is not None:
            rules.append(span(a, inputs, over=1))
        return rules

    def part(self, name: str, target: Target) -> tuple[Rows, Basis]:
        """Return the rows of a weight in its parameter, and its basis."""
        assert self.constraint.basis is not None
        return _rows(target), self.constraint.basis(name, target.shape)

    def of_parameter(self, parameter: nn.Parameter, parts: Sequence[tuple[Rows, Basis]]) -> Rule:
        """Project the updates of a parameter."""
        return project(parameter, parts)


class PullRules(DirectionRules[tuple[Rows, Pull, Tensor | None]]):
    """Weights are drawn back in the directions of a soft subspace."""

    def __init__(self, names: Names, constraint: Constraint, trains: Callable[[nn.Parameter], bool]) -> None:
        super().__init__(names, constraint, trains)
        # Weights that share an input (q, k and v) share its directions: one copy of them per device.
        self._on_device: dict[tuple[int, torch.device], Tensor] = {}

    def of_adapter(self, adapter: LoraAdapter, name: str, factors: _Factors) -> list[Rule]:
        """Draw the factor that reads (or writes) the directions back to nothing: B A began as nothing."""
        assert self.constraint.pull is not None
        a, b, shape = factors
        directions, strengths, axis = self.constraint.pull(name, shape)
        of_inputs = (axis == 1) != adapter.transposed
        factor = a if of_inputs else b
        own = Pull(directions, strengths, axis=1 if of_inputs else 0)
        return [pull(factor, [(None, own, torch.zeros(factor.shape))])] if self.trains(factor) else []

    def part(self, name: str, target: Target) -> tuple[Rows, Pull, Tensor | None]:
        """Return the rows of a weight in its parameter, its pull, and what it is drawn back to."""
        constraint = self.constraint
        assert constraint.pull is not None
        own = constraint.pull(name, target.shape)
        device = target.parameter.device
        here = self._on_device.setdefault((id(own.directions), device), own.directions.to(device))
        start = None if constraint.anchor is None else constraint.anchor(name, target.shape)
        return _rows(target), own._replace(directions=here), start

    def of_parameter(self, parameter: nn.Parameter, parts: Sequence[tuple[Rows, Pull, Tensor | None]]) -> Rule:
        """Pull a parameter."""
        return pull(parameter, parts)


def _rows(target: Target) -> Rows:
    piece = target.piece
    return None if piece.expert is None else (piece.expert, piece.start, piece.stop)
