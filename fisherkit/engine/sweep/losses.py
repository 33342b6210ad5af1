"""Losses of the samples of a run: each must be finite, and their mean is noted."""

import math

import torch
from torch import Tensor

from fisherkit.engine.sweep.job import Job
from fisherkit.errors import FisherkitError


class Losses:
    """Takes losses one by one; on a device they are looked at together, so that the host waits for it once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._samples: list[int] = []
        self._losses: list[Tensor] = []

    def add(self, sample: int, loss: Tensor) -> None:
        """Take the loss of a sample, a scalar.

        Raises:
            FisherkitError: it is not finite, which is seen here on a CPU, and in ``mean`` elsewhere.
        """
        self._samples.append(sample)
        self._losses.append(loss.detach())
        if loss.device.type == "cpu":
            self._check(sample, loss.item())

    def mean(self) -> float:
        """Return the mean over the samples of all ranks, which all call it at the same point.

        Raises:
            FisherkitError: one is not finite.
        """
        losses: list[float] = torch.stack(self._losses).cpu().tolist() if self._losses else []
        for sample, loss in zip(self._samples, losses, strict=True):
            self._check(sample, loss)
        return self._job.ranks.total(sum(losses)) / len(self._job.samples)

    def _check(self, sample: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise FisherkitError(
                f"row {self._job.samples[sample].row}: the loss is {loss}; the model overflows in "
                f"{self._job.skeleton.dtype}, try --dtype float32 (or bfloat16 instead of float16)"
            )
