"""Makes the rules for a model's parameters from what a run is asked to obey."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherkit.checkpoint.names.location import block_prefix, locate
from fisherkit.errors import CheckpointError, TrainingError
from fisherkit.training.adapters import spelled
from fisherkit.training.direction_rules import ProjectionRules, PullRules
from fisherkit.training.mask_input import Constraint
from fisherkit.training.names import Names, Target, find_all, read_names
from fisherkit.training.optimizers import parameters_of
from fisherkit.training.rules import Rule, freeze, scale

Trains = Callable[[nn.Parameter], bool]
"""Whether the optimizer updates a parameter in the coming step."""

LORA = (
    "a binary mask cannot hold on LoRA: every entry of B A depends on whole rows and columns of its factors; "
    "use a subspace or a layer_importance.json, train without LoRA, or apply the mask with `fisherkit merge --mask`"
)


def make_rules(model: nn.Module, constraint: Constraint, trains: Trains) -> list[Rule]:
    """Make the rules of a constraint for the parameters of ``model`` that are trained.

    Args:
        model: wrapped or not.
        constraint: what the run is asked to obey.
        trains: see ``Trains``; a parameter that is not trained gets no rule, unless it is the frozen factor of a LoRA
            adapter whose other factor is trained.

    Raises:
        CheckpointError: the mask belongs to another model.
        TrainingError: it cannot hold in this run.
    """
    names = read_names(model)
    if constraint.kind == "scale":
        return _scale_layers(model, constraint, trains)
    targets = _find(model, names, constraint)
    _refuse_other_adapters(names, constraint, targets, trains)
    if constraint.kind == "mask":
        return _freeze_all(names, constraint, targets, trains)
    kind = ProjectionRules if constraint.pull is None else PullRules
    return kind(names, constraint, trains).make(targets)


class ActiveRules:
    """Rules of a constraint for what an optimizer updates, made when it comes to update it.

    A weight gets its rule before the first step in which it can move: when the optimizer holds it and it requires a
    gradient. Layers that are unfrozen later and groups that are added later are picked up so.

    Args:
        optimizer: that is held.
        model: wrapped or not.
        constraint: what the run is asked to obey.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, constraint: Constraint) -> None:
        self._optimizer = optimizer
        self._model = model
        self._constraint = constraint
        self._seen: set[nn.Parameter] = set()
        self._rules: list[Rule] = []

    def __call__(self) -> list[Rule]:
        """Return the rules of the coming step.

        Raises:
            FisherkitError: what is trained now cannot be held; see make_rules.
        """
        fresh = {
            p for p in parameters_of(self._optimizer) if p not in self._seen and (p.requires_grad or p.grad is not None)
        }
        if fresh:
            self._seen |= fresh
            ruled = {rule.parameter for rule in self._rules}
            made = make_rules(self._model, self._constraint, fresh.__contains__)
            self._rules += [rule for rule in made if rule.parameter not in ruled]
        return self._rules


def check_held(model: nn.Module, constraint: Constraint, held: Callable[[nn.Parameter], bool]) -> None:
    """Raise TrainingError if an optimizer holds nothing of what a constraint speaks of.

    A parameter that the optimizer holds counts whether or not it requires a gradient now: it may later.
    """
    if constraint.kind == "scale":
        if not any(held(parameter) for parameter in _layers(model)):
            raise TrainingError(f"{constraint.label}: the optimizer trains no parameter of any layer it speaks of")
        return
    names = read_names(model)
    targets = _find(model, names, constraint)
    if not any(held(parameter) for target in targets.values() for parameter in _moving(names, target)):
        raise TrainingError(
            f"{constraint.label}: the optimizer trains none of its {len(targets)} weights; give the optimizer that "
            "holds the model's own parameters (one that keeps copies of its own cannot be held to a mask)"
        )


def _find(model: nn.Module, names: Names, constraint: Constraint) -> dict[str, Target]:
    targets = find_all(names, constraint.names, model)
    missing = [name for name in constraint.names if name not in targets]
    if missing or not constraint.names:
        raise CheckpointError(
            f"{constraint.label}: {len(missing)} of {len(constraint.names)} weights are not in this model, the first "
            f"{missing[0] if missing else None!r}; the {constraint.kind} was made for another model"
        )
    return targets


def _moving(names: Names, target: Target) -> Iterable[nn.Parameter]:
    """Yield the parameters whose training moves a weight: its own, and those of adapters on it."""
    yield target.parameter
    for lora in names.lora_of(target):
        yield from lora.factors
    for other in names.others_of(target):
        yield from other.parameters


def _refuse_other_adapters(names: Names, constraint: Constraint, targets: Mapping[str, Target], trains: Trains) -> None:
    for name, target in targets.items():
        for adapter in names.others_of(target):
            if not any(trains(parameter) for parameter in adapter.parameters):
                continue
            instead = "as it is" if constraint.kind == "mask" else "with LoRA"
            raise TrainingError(
                f"{constraint.label}: {name} is moved by an adapter of kind {adapter.kind!r}, which no "
                f"{constraint.kind} can hold: leave that weight out of the adapter's targets, or train it {instead}"
            )


# Masks


def _freeze_all(names: Names, constraint: Constraint, targets: Mapping[str, Target], trains: Trains) -> list[Rule]:
    """Freeze what a mask forbids; a parameter of which two names speak (tied weights) changes where both allow it."""
    assert constraint.flags is not None
    flags: dict[nn.Parameter, Tensor] = {}
    experts: dict[nn.Parameter, Tensor] = {}
    for name, target in targets.items():
        parameter = target.parameter
        if names.lora_of(target) or names.has_expert_lora(target):
            raise TrainingError(f"{constraint.label}: {LORA}")
        if not trains(parameter):
            continue
        own = constraint.flags(name, target.shape)
        if target.piece.expert is None:
            flags[parameter] = flags[parameter] & own if parameter in flags else own
        else:
            experts[parameter] = _with_expert(experts.get(parameter), target, own)
    for parameter, joined in experts.items():
        flags[parameter] = flags[parameter] & joined if parameter in flags else joined
    rules = (freeze(parameter, own) for parameter, own in flags.items())
    return [rule for rule in rules if rule is not None]


def _with_expert(joined: Tensor | None, target: Target, own: Tensor) -> Tensor:
    """Return the flags of fused experts with those of one more; experts that the mask does not speak of are free."""
    shape = target.parameter.shape
    if joined is None:
        joined = torch.ones((*shape[:-1], 1), dtype=torch.bool)
    if own.shape[-1] != joined.shape[-1]:
        joined = joined.expand(shape).contiguous()
    target.part(joined).copy_(own)
    return joined


# Layer scales


def _scale_layers(model: nn.Module, constraint: Constraint, trains: Trains) -> list[Rule]:
    """Scale every trained parameter of a scaled layer, adapters and biases included."""
    layers = _layers(model)
    known = {number for own in layers.values() for number in own}
    missing = sorted(constraint.scales.keys() - known)
    if missing:
        raise CheckpointError(
            f"{constraint.label}: speaks of layer {missing[0]}, and this model has {len(known)} layers; "
            "it was measured on another model"
        )
    rules = (scale(parameter, _one_scale(constraint, own)) for parameter, own in layers.items() if trains(parameter))
    return [rule for rule in rules if rule is not None]


def _one_scale(constraint: Constraint, layers: Sequence[int]) -> float:
    """Return the scale of a parameter; some adapters (VB-LoRA, Uni-LoRA) train one tensor for many layers."""
    scales = {constraint.scales.get(layer, 1.0) for layer in layers}
    if len(scales) > 1:
        raise TrainingError(
            f"{constraint.label}: layers {layers[0]} to {layers[-1]} share one trained tensor, and their scales "
            "differ; train weights or adapters that each layer has for itself, such as LoRA"
        )
    return scales.pop()


def _layers(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """Return the numbers of the layers that each parameter of a layer lies in; one, unless it is shared."""
    named = [(spelled(name), parameter) for name, parameter in model.named_parameters(remove_duplicate=False)]
    blocks = block_prefix(name for name, _ in named)
    found: dict[nn.Parameter, list[int]] = {}
    for name, parameter in named:
        layer = locate(name, blocks).layer
        if layer is not None:
            found.setdefault(parameter, []).append(layer)
    return {parameter: sorted(set(own)) for parameter, own in found.items()}
