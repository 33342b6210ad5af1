"""MaskedUpdate: a mask for transformers' Trainer and for everything built on it (TRL, axolotl, LLaMA-Factory)."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from fisherkit.artefacts.layer_importance import FLOOR, POWER
from fisherkit.errors import TrainingError
from fisherkit.training.course import peak_steps
from fisherkit.training.mask_input import MaskLike
from fisherkit.training.names import DEEPSPEED
from fisherkit.training.optimizer_hooks import Handle, Parity, constrain


class MaskedUpdate(TrainerCallback):  # type: ignore[misc]  # transformers comes without types
    """Make a Trainer's every step obey a mask: ``Trainer(..., callbacks=[MaskedUpdate("mask.safetensors")])``.

    Args:
        mask: as for ``constrain``: a mask, a subspace or a ``layer_importance.json``, by path or in memory.
        parity: ``paper`` masks the gradients instead, as it was published.
        power: of layer scales.
        floor: the smallest layer scale.
        pull: how soft a subspace is, in place of what its file says; spread over the Trainer's whole course.
        anchor: the checkpoint that a soft subspace draws back to; the weights at the start of training otherwise. A
            run that is resumed has to name it (full fine-tuning; LoRA does not).

    What is not possible is refused when training begins; see ``constrain``.
    """

    def __init__(
        self,
        mask: MaskLike,
        *,
        parity: Parity = None,
        power: float = POWER,
        floor: float = FLOOR,
        pull: float | None = None,
        anchor: str | Path | None = None,
    ) -> None:
        self._mask = mask
        self._options: dict[str, Any] = {
            **{"parity": parity, "power": power, "floor": floor},
            **{"pull": pull, "anchor": anchor},
        }
        self._handle: Handle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the mask in force on the Trainer's optimizer."""
        refuse_deepspeed(args)
        self.on_train_end(args, state, control)  # an earlier run may have ended in an error
        model: nn.Module = kwargs["model"]
        steps = peak_steps(kwargs.get("lr_scheduler"), state.max_steps)
        self._handle = constrain(kwargs["optimizer"], model, self._mask, **self._options, steps=steps)
        if state.global_step and self._options["anchor"] is None and self._handle.is_anchored_here:
            self.on_train_end(args, state, control)
            raise TrainingError(
                f"this run is resumed at step {state.global_step}, so its weights are no longer those that a soft "
                "subspace draws back to; name the checkpoint it began from: MaskedUpdate(..., anchor=...)"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise TrainingError if the first training step was over without a step of the optimizer that is held."""
        handle, optimizer = self._handle, kwargs.get("optimizer")
        if handle is None or handle.steps or getattr(optimizer, "step_was_skipped", False):  # float16 skips the first
            return
        self.on_train_end(args, state, control)
        raise TrainingError(
            "a training step is over and the optimizer was never asked to step, so the mask does not hold: something "
            "else updates the weights, such as hooks during the backward pass; use an optimizer that steps"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the optimizer go."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def refuse_deepspeed(args: Any) -> None:
    """Raise TrainingError if a Trainer was told to use DeepSpeed."""
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        raise TrainingError(DEEPSPEED)
