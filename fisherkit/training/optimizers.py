"""Optimizers: which one of a run to hook, and those that no rule around a step can hold."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fisherkit.errors import TrainingError
from fisherkit.training.names import DEEPSPEED

_INNER = ("optimizer", "base", "base_optimizer")
"""Attributes under which wrappers keep the optimizer that they wrap."""


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yield what an optimizer holds, group by group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def unwrap(optimizer: Any) -> Optimizer:
    """Return the outermost optimizer whose step runs hooks: inside of accelerate's wrapper, and Lookahead itself.

    Raises:
        TrainingError: DeepSpeed's, nothing that steps as torch's optimizers do, or one that never steps.
    """
    while not _runs_hooks(optimizer) and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    name = type(optimizer).__name__
    if "deepspeed" in f"{type(optimizer).__module__}.{name}".lower():
        raise TrainingError(DEEPSPEED)
    if not isinstance(optimizer, Optimizer):
        raise TrainingError(f"{name} is no torch optimizer, so there is no step to hold to a mask")
    if _never_steps(optimizer):
        raise TrainingError(
            f"{name} updates weights during the backward pass and never calls step(), so no mask holds: use an "
            "optimizer that steps, or apply the mask after training with `fisherkit merge --mask`"
        )
    if not _runs_hooks(optimizer):
        raise TrainingError(f"{name} runs no step hooks (its __init__ does not call torch's), so no mask holds")
    return optimizer


def refuse_copies(optimizer: Any) -> None:
    """Raise TrainingError if an optimizer keeps weights of its own beside the model's, which no rule would reach.

    Schedule-free optimizers and SPlus train one point and evaluate another, and Trainer calls their ``eval()`` at every
    evaluation and checkpoint. BAdam and optimizers for float16 step on copies and write these over the model's weights.
    """
    instead = "use an optimizer such as AdamW, or apply the mask after training with `fisherkit merge --mask`"
    own = set(parameters_of(optimizer)) if isinstance(optimizer, Optimizer) else None
    for inner in _chain(optimizer):
        name = type(inner).__name__
        if (
            callable(getattr(inner, "eval", None))
            and callable(getattr(inner, "train", None))
            and not _is_wrapper(inner)
        ):
            raise TrainingError(
                f"{name} keeps a second set of weights, which its eval() writes over the model's, so no mask holds: "
                f"{instead}"
            )
        if own is not None and not own.issuperset(parameters_of(inner)):
            raise TrainingError(
                f"{type(optimizer).__name__} steps on copies of the weights and writes them over the model's, so what "
                f"a mask takes back returns with the next step: {instead}"
            )


def _runs_hooks(optimizer: Any) -> bool:
    """Torch patches the step of a class when ``Optimizer.__init__`` runs; accelerate's wrapper never calls that."""
    return hasattr(getattr(type(optimizer), "step", None), "hooked")


def _is_wrapper(optimizer: Any) -> bool:
    """Accelerate's wrapper has train() and eval() that only hand on; what it wraps is looked at by itself."""
    return type(optimizer).__module__.startswith("accelerate.")


def _never_steps(optimizer: Optimizer) -> bool:
    return hasattr(optimizer, "fused_backward") or inspect.unwrap(type(optimizer).step) is inspect.unwrap(
        Optimizer.step
    )


def _chain(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those that it wraps, outermost first."""
    seen: set[int] = set()
    waiting = [optimizer]
    while waiting:
        own = waiting.pop()
        if id(own) in seen:
            continue
        seen.add(id(own))
        yield own
        waiting += [inner for name in _INNER if isinstance(inner := getattr(own, name, None), Optimizer)]
