"""From what a run is asked to obey and the model it trains, the rules for its parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fisherkit.checkpoint.names.location import block_prefix, locate
from fisherkit.errors import CheckpointError, TrainingError
from fisherkit.training.mask_input import Basis, Constraint, Pull
from fisherkit.training.names import Adapter, Names, Target, find_all, read_names, spelled
from fisherkit.training.rules import Rows, Rule, freeze, project, pull, scale, span
from fisherkit.training.shards import is_sharded

_FROM_WEIGHT = ("pissa", "olora", "corda", "loftq")
"""Ways of peft to begin LoRA with what it takes out of the weight, so that B A is not nothing."""
_Part = TypeVar("_Part")
_Factors = tuple[nn.Parameter, nn.Parameter, tuple[int, ...]]

Trains = Callable[[nn.Parameter], bool]
"""Whether the optimizer updates a parameter."""

LORA = (
    "a binary mask cannot hold on LoRA: every entry of B A depends on whole rows and columns of its factors; "
    "use a subspace or a layer_importance.json, train without LoRA, or apply the mask with `fisherkit merge --mask`"
)


def make_rules(model: nn.Module, wanted: Constraint, trains: Trains) -> list[Rule]:
    """The rules that ``wanted`` makes for the parameters of ``model`` that are trained.

    Raises:
        CheckpointError: the mask belongs to another model.
        TrainingError: it cannot hold in this run, or concerns nothing that is trained.
    """
    names = read_names(model)
    if wanted.kind == "scale":
        rules = _scale_layers(model, wanted, trains)
    else:
        targets = find_all(names, wanted.names, model)
        _check_found(wanted, targets)
        make = _freeze_all if wanted.kind == "mask" else _project_all if wanted.pull is None else _pull_all
        rules = make(names, wanted, targets, trains)
        concerned = any(_is_trained(names, target, trains) for target in targets.values())
        if not concerned:
            raise TrainingError(
                f"{wanted.label}: the optimizer trains none of its {len(targets)} weights; give the optimizer that "
                "holds the model's own parameters (one that keeps copies of its own cannot be held to a mask)"
            )
    return rules


def _check_found(wanted: Constraint, targets: Mapping[str, Target]) -> None:
    missing = [name for name in wanted.names if name not in targets]
    if missing or not wanted.names:
        raise CheckpointError(
            f"{wanted.label}: {len(missing)} of {len(wanted.names)} weights are not in this model, the first "
            f"{missing[0] if missing else None!r}; the {wanted.kind} was made for another model"
        )


def _is_trained(names: Names, target: Target, trains: Trains) -> bool:
    factors = [factor for adapter in names.adapters_of(target) for factor in (adapter.a, adapter.b)]
    return any(parameter is not None and trains(parameter) for parameter in (target.parameter, *factors))


def _freeze_all(names: Names, wanted: Constraint, targets: Mapping[str, Target], trains: Trains) -> list[Rule]:
    """A parameter of which two names speak (tied weights) changes where both allow it."""
    assert wanted.flags is not None
    flags: dict[nn.Parameter, Tensor] = {}
    experts: dict[nn.Parameter, Tensor] = {}
    for name, target in targets.items():
        parameter = target.parameter
        if names.adapters_of(target) or _has_expert_adapter(names, target):
            raise TrainingError(f"{wanted.label}: {LORA}")
        if not trains(parameter):
            continue
        own = wanted.flags(name, target.shape)
        if target.piece.expert is None:
            flags[parameter] = flags[parameter] & own if parameter in flags else own
        else:
            experts[parameter] = _with_expert(experts.get(parameter), target, own)
    for parameter, joined in experts.items():
        flags[parameter] = flags[parameter] & joined if parameter in flags else joined
    rules = (freeze(parameter, own) for parameter, own in flags.items())
    return [rule for rule in rules if rule is not None]


def _with_expert(joined: Tensor | None, target: Target, own: Tensor) -> Tensor:
    """The flags of fused experts with those of one more; experts that the mask does not speak of are free."""
    shape = target.parameter.shape
    if joined is None:
        joined = torch.ones((*shape[:-1], 1), dtype=torch.bool)
    if own.shape[-1] != joined.shape[-1]:
        joined = joined.expand(shape).contiguous()
    target.part(joined).copy_(own)
    return joined


def _project_all(names: Names, wanted: Constraint, targets: Mapping[str, Target], trains: Trains) -> list[Rule]:
    basis = wanted.basis
    assert basis is not None

    def part(name: str, target: Target) -> tuple[Rows, Basis]:
        return _rows(target), basis(name, target.shape)

    return _hold_all(names, wanted, targets, trains, (_span_adapter, part, project))


def _pull_all(names: Names, wanted: Constraint, targets: Mapping[str, Target], trains: Trains) -> list[Rule]:
    """Of LoRA, the factor that reads (or writes) the directions is drawn back to nothing: B A began as nothing."""
    directions_of, anchor = wanted.pull, wanted.anchor
    assert directions_of is not None
    on_device: dict[tuple[int, torch.device], Tensor] = {}  # weights that share an input share its directions

    def part(name: str, target: Target) -> tuple[Rows, Pull, Tensor | None]:
        own = directions_of(name, target.shape)
        key = id(own.directions), target.parameter.device
        here = on_device.setdefault(key, own.directions.to(target.parameter.device))
        start = None if anchor is None else anchor(name, target.shape)
        return _rows(target), own._replace(directions=here), start

    return _hold_all(names, wanted, targets, trains, (_pull_adapter, part, pull))


def _hold_all(
    names: Names,
    wanted: Constraint,
    targets: Mapping[str, Target],
    trains: Trains,
    how: tuple[
        Callable[[Adapter, Constraint, str, Trains], list[Rule]],
        Callable[[str, Target], _Part],
        Callable[[nn.Parameter, Sequence[_Part]], Rule],
    ],
) -> list[Rule]:
    """Rules for the adapters on every weight, then one per parameter that is trained, of all weights that lie in it.

    Args:
        names: of the model.
        wanted: a subspace.
        targets: its weights.
        trains: what the optimizer holds.
        how: rules of an adapter; what a weight asks of its parameter; the rule of a parameter.

    Raises:
        TrainingError: an adapter or a parameter that directions cannot hold.
    """
    of_adapter, part, make = how
    rules: list[Rule] = []
    parts: dict[nn.Parameter, list[_Part]] = {}
    for name, target in targets.items():
        if _has_expert_adapter(names, target):
            raise TrainingError(
                f"{wanted.label}: {name} has LoRA on fused experts, whose factors a subspace cannot hold"
            )
        for adapter in names.adapters_of(target):
            rules += of_adapter(adapter, wanted, name, trains)
        if trains(target.parameter):
            _refuse_part(wanted, name, target)
            parts.setdefault(target.parameter, []).append(part(name, target))
    return rules + [make(parameter, own) for parameter, own in parts.items()]


def _pull_adapter(adapter: Adapter, wanted: Constraint, name: str, trains: Trains) -> list[Rule]:
    factors = _factors(adapter, wanted, name, trains)
    if factors is None:
        return []
    assert wanted.pull is not None
    a, b, shape = factors
    directions, strengths, axis = wanted.pull(name, shape)
    of_inputs = (axis == 1) != adapter.transposed
    factor = a if of_inputs else b
    own = Pull(directions, strengths, axis=1 if of_inputs else 0)
    return [pull(factor, [(None, own, torch.zeros(factor.shape))])] if trains(factor) else []


def _rows(target: Target) -> Rows:
    piece = target.piece
    return None if piece.expert is None else (piece.expert, piece.start, piece.stop)


def _refuse_part(wanted: Constraint, name: str, target: Target) -> None:
    if target.piece.expert is not None and is_sharded(target.parameter):
        raise TrainingError(
            f"{wanted.label}: {name} is an expert of {target.name}, which FSDP2 spreads over processes, so it cannot "
            "be projected alone; train unsharded, or apply the subspace with `fisherkit merge --subspace`"
        )


def _has_expert_adapter(names: Names, target: Target) -> bool:
    return any(spelled(target.name).startswith(f"{module}.") for module in names.experts)


def _span_adapter(adapter: Adapter, wanted: Constraint, name: str, trains: Trains) -> list[Rule]:
    """B loses what lies in U, A what lies in V; where the weight is stored as [in, out], the other way round."""
    factors = _factors(adapter, wanted, name, trains)
    if factors is None:
        return []
    assert wanted.basis is not None
    a, b, shape = factors
    u, v = wanted.basis(name, shape)
    outputs, inputs = (v, u) if adapter.transposed else (u, v)
    rules = []
    if outputs is not None:
        rules.append(span(b, outputs, over=0))
    if inputs is not None:
        rules.append(span(a, inputs, over=1))
    return rules


def _factors(adapter: Adapter, wanted: Constraint, name: str, trains: Trains) -> _Factors | None:
    """A, B and the weight's shape, fit to be held to directions; None where neither is trained."""
    if not any(factor is not None and trains(factor) for factor in (adapter.a, adapter.b)):
        return None
    if adapter.magnitude is not None:
        raise TrainingError(
            f"{wanted.label}: {name} has a DoRA adapter, whose magnitudes scale whole rows out of any subspace; "
            "use LoRA without use_dora"
        )
    if adapter.begun.lower().startswith(_FROM_WEIGHT):
        raise TrainingError(
            f"{wanted.label}: {name} has LoRA that was begun from the weight itself (init_lora_weights="
            f"{adapter.begun!r}), which a subspace would take out of the model; use init_lora_weights=True"
        )
    if adapter.a is None or adapter.b is None or adapter.shape is None:
        raise TrainingError(f"{wanted.label}: the adapter of {adapter.module} lacks a LoRA factor")
    return adapter.a, adapter.b, adapter.shape


def _scale_layers(model: nn.Module, wanted: Constraint, trains: Trains) -> list[Rule]:
    """A rule for every trained parameter of a scaled layer, adapters and biases included."""
    layers: dict[nn.Parameter, int] = {}
    named = {spelled(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    blocks = block_prefix(named)
    for name, parameter in named.items():
        layer = locate(name, blocks).layer
        if layer is not None:
            layers[parameter] = layer
    missing = sorted(wanted.scales.keys() - layers.values())
    if missing:
        raise CheckpointError(
            f"{wanted.label}: speaks of layer {missing[0]}, and this model has {len(set(layers.values()))} layers; "
            "it was measured on another model"
        )
    trained = {parameter: layer for parameter, layer in layers.items() if trains(parameter)}
    if not trained:
        raise TrainingError(f"{wanted.label}: the optimizer trains no parameter of any layer it speaks of")
    rules = (scale(parameter, wanted.scales.get(layer, 1.0)) for parameter, layer in trained.items())
    return [rule for rule in rules if rule is not None]
