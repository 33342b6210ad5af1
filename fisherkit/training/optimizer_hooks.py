"""Rules in force on an optimizer: around every step, or on the gradients before it.

The weights to remember are a copy of what is masked. Where the optimizer updates each parameter by itself, it is made
to take its step a few parameters at a time, so that only theirs are remembered at once.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherkit.artefacts.layer_importance import FLOOR, POWER
from fisherkit.errors import OptionError
from fisherkit.training.make_rules import ActiveRules, check_held
from fisherkit.training.mask_input import MaskLike, read_constraint
from fisherkit.training.optimizers import parameters_of, refuse_copies, unwrap
from fisherkit.training.rules import Rule

Parity = Literal["paper"] | None

_TURN_BYTES = 16 << 20
# Optimizers that treat parameters one by one and keep nothing in their groups: a step by parts is the same step.
_BY_PARAMETER = frozenset(
    f"torch.optim.{name}"
    for name in (
        *("adadelta.Adadelta", "adagrad.Adagrad", "adam.Adam", "adamax.Adamax", "adamw.AdamW", "nadam.NAdam"),
        *("radam.RAdam", "rmsprop.RMSprop", "sgd.SGD", "_adafactor.Adafactor"),
    )
) | {"transformers.optimization.Adafactor"}


def constrain(
    optimizer: Optimizer,
    model: nn.Module,
    mask: MaskLike,
    *,
    parity: Parity = None,
    power: float = POWER,
    floor: float = FLOOR,
    pull: float | None = None,
    anchor: str | Path | None = None,
    steps: float | None = None,
) -> "Handle":
    """Make every coming step of ``optimizer`` obey ``mask``, until the handle is removed.

    Parameters that the mask does not speak of stay free. Call it after the model is wrapped and the optimizer made. In
    a distributed run every process calls it.

    Args:
        optimizer: any of torch's kind that holds the model's own parameters.
        model: wrapped or not.
        mask: path of a mask, a subspace or a ``layer_importance.json``; an open MaskFile; bool tensors by checkpoint
            name (True = may change); modes by name (``<name>.U``, ``<name>.V``); or layer importance as numbers.
            Entries that may not change keep their bits; the update of a weight stays out of a subspace (and so do LoRA
            factors, from this call on), or is drawn back out of a soft one after every step (see kernels.pull: the
            harder the nearer the learning rate is to its peak, which is the largest that the group has had or names
            as ``initial_lr`` or ``max_lr``); the update of a layer is multiplied by its scale. Of several on one
            optimizer a binary mask comes last, or what follows moves what it froze.
        parity: ``paper`` applies the mask to the gradients before the step instead, as it was published. Weight decay
            and old momentum then move what is frozen, AdamW undoes scales and turns updates back into a subspace.
        power: of layer scales, ``(median(I) / I) ** power``.
        floor: the smallest layer scale.
        pull: how soft a subspace is, in place of what its file says.
        steps: how long the course is, in steps at its peak rate: all of them at a constant rate, half of them where it
            falls to zero in a line or a cosine. A soft subspace spreads its pull over it; others do not need it.
        anchor: the checkpoint (folder, file or ``org/name``) that a soft subspace draws back to; None for the weights
            as they are now. LoRA needs none: its delta is drawn back to nothing.

    Raises:
        CheckpointError: the mask or the anchor cannot be read, or was made for another model.
        TrainingError: DeepSpeed, FSDP1, a binary mask on LoRA, or an optimizer that does not hold the masked weights.
        OptionError: an option is not a possible value, is given for a mask that has no use for it, or is missing:
            ``steps`` of a soft subspace.
    """
    if parity not in (None, "paper"):
        raise OptionError(f"parity must be None or 'paper', not {parity!r}")
    if parity is None:
        refuse_copies(optimizer)
    optimizer = unwrap(optimizer)
    if parity == "paper":
        steps = 1  # each gradient is divided by the strengths of the whole course
    constraint = read_constraint(mask, power=power, floor=floor, pull=pull, anchor=anchor, steps=steps)
    check_held(model, constraint, set(parameters_of(optimizer)).__contains__)
    rules = ActiveRules(optimizer, model, constraint)
    rules()  # what cannot be held is refused now, not at the first step
    return Handle(optimizer, rules, on_gradients=parity == "paper")


class Handle:
    """Rules in force on an optimizer; ``remove`` ends that.

    Attributes:
        rules: asked before every step for what holds during it.
        steps: how many steps of the optimizer have been held to them.
        turn_bytes: how much is remembered at a time, where a step may be taken by parts; None for all at once.
    """

    def __init__(
        self, optimizer: Optimizer, rules: Callable[[], Iterable[Rule]], *, on_gradients: bool = False
    ) -> None:
        self.rules = rules
        self.steps = 0
        self.turn_bytes: int | None = _TURN_BYTES
        self._on_gradients = on_gradients
        self._peaks = {id(parameter): peak for parameter, _, peak in _rates(optimizer)}
        # A step may call the step of its base class, hooks and all: what is remembered last is enforced first.
        self._undo: list[Callable[[], None]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def is_anchored_here(self) -> bool:
        """True if a rule draws weights back to what they were when it was made."""
        return not self._on_gradients and any(rule.is_anchored_here for rule in self.rules())

    def remove(self) -> None:
        """Let the optimizer step freely again; a second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.steps += 1
        rules = list(self.rules())
        self._set_pace(optimizer, rules)
        if self._on_gradients:
            for rule in rules:
                if rule.parameter.grad is not None:
                    rule.on_gradient(rule.parameter.grad)
        elif self.turn_bytes is not None and _steps_by_parameter(optimizer, args, kwargs):
            self._undo.append(_step_in_turns(optimizer, rules, self.turn_bytes))
        else:
            remembered = [(rule, rule.remember()) for rule in rules if rule.nbytes or _may_move(rule.parameter)]
            self._undo.append(lambda: _enforce(remembered))

    def _set_pace(self, optimizer: Optimizer, rules: Iterable[Rule]) -> None:
        """Tell the rules that ask how large the coming step is."""
        asking = [rule for rule in rules if rule.pace is not None]
        paces = {}
        for parameter, rate, known in _rates(optimizer) if asking else ():
            peak = self._peaks[id(parameter)] = max(self._peaks.get(id(parameter), 0.0), known)
            paces[id(parameter)] = rate / peak if peak else 0.0
        for rule in asking:
            rule.pace = paces.get(id(rule.parameter), 0.0)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._undo:
            self._undo.pop()()


def _rates(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, float, float]]:
    """Yield parameters with their learning rate and the largest known one: a scheduler begins by saying its own."""
    for group in optimizer.param_groups:
        rate = 1.0 if group.get("lr") is None else float(group["lr"])  # transformers' Adafactor may have none to say
        peak = max(rate, *(float(group.get(key) or 0.0) for key in ("initial_lr", "max_lr")))  # max_lr: OneCycleLR's
        for parameter in group["params"]:
            yield parameter, rate, peak


def _may_move(parameter: nn.Parameter) -> bool:
    """Return False for a weight that is frozen again: what draws back after every step leaves it alone, too."""
    return parameter.requires_grad or parameter.grad is not None


def _enforce(remembered: Iterable[tuple[Rule, Tensor]]) -> None:
    for rule, before in remembered:
        rule.enforce(before)


def _steps_by_parameter(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a step may be taken by parts: no closure to run first, no other hook that would come too late."""
    kind = type(optimizer)
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return (
        f"{kind.__module__}.{kind.__name__}" in _BY_PARAMETER
        and all(given is None for given in (*args[1:], *kwargs.values()))  # the first is the optimizer
        and all(len(own) == 1 for own in hooks)
        and hasattr(kind.step, "__wrapped__")
    )


def _step_in_turns(optimizer: Optimizer, rules: Iterable[Rule], turn_bytes: int) -> Callable[[], None]:
    """Take the whole step a few parameters at a time; what follows the hook then finds no parameter left to update.

    Returns:
        What gives the optimizer its groups back.
    """
    step = inspect.unwrap(type(optimizer).step, stop=lambda function: not hasattr(function, "hooked"))
    groups, by_parameter = optimizer.param_groups, _by_parameter(rules)
    try:
        for group in groups:
            for turn in _turns(group["params"], by_parameter, turn_bytes):
                optimizer.param_groups = [{**group, "params": turn}]
                held = [rule for parameter in turn for rule in by_parameter.get(parameter, ())]
                acting = (rule for rule in held if rule.parameter.grad is not None or not rule.nbytes)
                remembered = [(rule, rule.remember()) for rule in acting if _may_move(rule.parameter)]
                step(optimizer)
                _enforce(remembered)
    except BaseException:
        optimizer.param_groups = groups
        raise
    optimizer.param_groups = []
    return lambda: setattr(optimizer, "param_groups", groups)


def _by_parameter(rules: Iterable[Rule]) -> dict[nn.Parameter, list[Rule]]:
    found: dict[nn.Parameter, list[Rule]] = {}
    for rule in rules:
        found.setdefault(rule.parameter, []).append(rule)
    return found


def _turns(
    parameters: list[nn.Parameter], rules: Mapping[nn.Parameter, list[Rule]], turn_bytes: int
) -> Iterator[list[nn.Parameter]]:
    """Yield parameters in order, as many at a time as have ``turn_bytes`` to remember."""
    turn: list[nn.Parameter] = []
    room = turn_bytes
    for parameter in parameters:
        need = sum(rule.nbytes for rule in rules.get(parameter, ()))
        if turn and need > room:
            yield turn
            turn, room = [], turn_bytes
        turn.append(parameter)
        room -= need
    if turn:
        yield turn
