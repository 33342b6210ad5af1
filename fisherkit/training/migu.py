"""MIGU (arXiv 2406.17245): update only the rows whose outputs are largest, chosen anew for every step.

For each linear layer the magnitudes of its outputs are summed over all tokens since the last step (padding included, as
published); rows at or above the ``threshold`` quantile of their layer may change. Biases are not masked. In a
distributed run the magnitudes are summed over all processes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from fisherkit.errors import OptionError, TrainingError
from fisherkit.training.callback import refuse_deepspeed
from fisherkit.training.names import read_names
from fisherkit.training.optimizer_hooks import Handle, Parity
from fisherkit.training.optimizers import unwrap
from fisherkit.training.rules import Rule, freeze


class MIGU(TrainerCallback):  # type: ignore[misc]  # transformers comes without types
    """Published baseline: ``Trainer(..., callbacks=[MIGU()])``, or ``attach`` for loops of one's own.

    Args:
        threshold: share of the rows of each layer that stay frozen in a step.
        parity: ``paper`` masks the gradients, as published; None holds the update itself to the mask.

    Raises:
        OptionError: a threshold outside of 0 to 1, or another parity.
    """

    def __init__(self, threshold: float = 0.7, *, parity: Parity = "paper") -> None:
        if not 0 <= threshold <= 1:
            raise OptionError(f"the threshold of MIGU must be between 0 and 1, not {threshold}")
        if parity not in (None, "paper"):
            raise OptionError(f"parity must be None or 'paper', not {parity!r}")
        self._threshold = threshold
        self._parity = parity
        self._detach: Callable[[], None] | None = None

    def attach(self, optimizer: Optimizer, model: nn.Module) -> Callable[[], None]:
        """Watch the outputs of ``model`` and mask every coming step of ``optimizer``.

        Returns:
            What ends it.

        Raises:
            TrainingError: DeepSpeed, FSDP1, or no linear layer is trained.
        """
        read_names(model)  # refuses wrappers that hide the weights
        optimizer = unwrap(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        outputs = [
            _Outputs(module)
            for module in model.modules()
            if isinstance(module, nn.Linear) and id(module.weight) in held
        ]
        if not outputs:
            raise TrainingError("MIGU: the optimizer trains no linear layer of this model")
        handle = Handle(optimizer, lambda: _rules(outputs, self._threshold), on_gradients=self._parity == "paper")

        def detach() -> None:
            handle.remove()
            for output in outputs:
                output.hook.remove()

        return detach

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the Trainer's model and optimizer."""
        refuse_deepspeed(args)
        self.on_train_end(args, state, control)
        self._detach = self.attach(kwargs["optimizer"], kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of both."""
        if self._detach is not None:
            self._detach()
            self._detach = None


class _Outputs:
    """Output magnitudes of one linear layer since the last step."""

    def __init__(self, module: nn.Linear) -> None:
        assert isinstance(module.weight, nn.Parameter)
        self.weight = module.weight
        self.hook = module.register_forward_hook(self._add)
        self._magnitude: Tensor | None = None

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training:  # an evaluation between two steps is none of their business
            own = output.detach().flatten(0, -2).abs().sum(0, dtype=torch.float32)
            self._magnitude = own if self._magnitude is None else self._magnitude + own

    def take(self) -> Tensor | None:
        """Return the magnitudes [out] over all processes and start over; None (or zeros) where none used the layer."""
        magnitude, self._magnitude = self._magnitude, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if magnitude is None:  # another process may have used it, and waits for this one
                magnitude = torch.zeros(self.weight.shape[0], device=self.weight.device)
            torch.distributed.all_reduce(magnitude)
        return magnitude


def _rules(outputs: list[_Outputs], threshold: float) -> Iterator[Rule]:
    for output in outputs:
        magnitude = output.take()
        if magnitude is None:
            continue
        rule = freeze(output.weight, (magnitude >= torch.quantile(magnitude, threshold))[:, None])
        if rule is not None:
            yield rule
