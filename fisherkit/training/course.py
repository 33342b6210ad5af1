"""Length of a course of training, in steps at its peak learning rate."""

from collections.abc import Callable
from typing import Any


def peak_steps(scheduler: Any, steps: int) -> float:
    """Return the sum over a course of each step's learning rate as a share of the peak.

    Args:
        scheduler: a Trainer's, wrapped or not. The rates of torch's ``LambdaLR``, which transformers makes, are known
            beforehand. Of any other half the steps are counted, as of a line or a cosine down to zero; all of them
            where there is no scheduler.
        steps: how many steps the optimizer takes.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if scheduler is None:
        return float(steps) or 1.0
    shares: list[Callable[[int], float]] = getattr(scheduler, "lr_lambdas", [])
    if not shares:
        return steps / 2 or 1.0
    paces = [float(shares[0](step)) for step in range(steps)]
    return sum(paces) / max([1.0, *paces]) or 1.0  # a course at no rate at all moves nothing, and nothing is drawn back
