"""What an engine is asked to do: samples, targets, and where finished values go."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherkit.checkpoint.work_folder import Work
from fisherkit.engine.covariance.hooks import CovarianceHooks
from fisherkit.engine.covariance.writer import CovarianceWriter
from fisherkit.engine.model.plan import Plan
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.engine.sweep.spool import Budget
from fisherkit.errors import FisherkitError
from fisherkit.kernels.loss import sample_labels, sample_loss
from fisherkit.progress import Track
from fisherkit.prompts.dataset import Sample


class Sink(Protocol):
    """Takes finished Fisher values; keeps them for good once synced."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Mean squared gradients by parameter name, float32; all measured parameters of a block come together."""

    def state(self) -> dict[str, Any]:
        """JSON that restores the sink as it is now, in another process; a copy."""

    def sync(self) -> None:
        """Everything added so far is on the disk when this returns; may run beside later adds."""


@dataclass
class Job:
    """A measurement: of which model, on which samples, to where.

    Attributes:
        batches: numbers of the samples that are padded together.
        general: parameters to leave to autograd although a linear layer holds them.
        keep_weights: leave weights on the device between the two sweeps.
        moments: gathers second moments of activations and writes them; None where none are asked for.
    """

    skeleton: Skeleton
    plan: Plan
    samples: Sequence[Sample]
    batches: Sequence[Sequence[int]]
    device: torch.device
    work: Work
    sink: Sink
    budget: Budget
    track: Track
    reduction: str = "mean"
    labels: str = "data"
    seed: int = 0
    keep_weights: bool = False
    general: frozenset[str] = field(default_factory=frozenset)
    moments: CovarianceWriter | None = None

    def ids(self, batch: Sequence[int]) -> Tensor:
        """Token ids [B, T] on the device, short samples filled up on the right with their own last token.

        No padding mask is needed: a causal model never looks to the right, and pads have no loss.
        """
        rows = [self.samples[number].ids for number in batch]
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=self.device)

    def lengths(self, batch: Sequence[int]) -> list[int]:
        """Real tokens of each sample of a batch."""
        return [len(self.samples[number].ids) for number in batch]

    def loss(self, number: int, logits: Tensor) -> Tensor:
        """l_n of one sample from its logits [T, V]; labels from the data, or drawn from the model.

        Raises:
            FisherkitError: the loss is not finite.
        """
        sample = self.samples[number]
        labels = torch.tensor(sample.ids, device=logits.device)
        if self.labels == "sampled":
            labels = sample_labels(logits.detach(), labels, (self.seed * 1_000_003 + sample.row) % 2**63)
        loss = sample_loss(logits, labels, torch.tensor(sample.counts, device=logits.device), self.reduction)
        if not torch.isfinite(loss):
            raise FisherkitError(
                f"row {sample.row}: the loss is {loss.item()}; the model overflows in {self.skeleton.dtype}, "
                "try --dtype float32 (or bfloat16 instead of float16)"
            )
        return loss

    def accumulators(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Zeros, float32, for every one of these parameters; in one piece of memory."""
        shapes = {name: self.skeleton.model.get_parameter(name).shape for name in names}
        memory = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=self.device)
        parts = torch.split(memory, [shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def deliver(
        self, blocks: Sequence[int | None], sums: dict[str, Tensor], gathered: CovarianceHooks | None = None
    ) -> None:
        """Hand sums of squares to the sink as means over the samples, block by block, and moments to their file."""
        if gathered is not None and self.moments is not None:
            self.moments.keep(gathered)
        for block in blocks:
            own = {name: sums.pop(name).div_(len(self.samples)) for name in self.plan.names([block])}
            if own:
                self.sink.add(own)

    def gathering(self, blocks: Sequence[int | None]) -> AbstractContextManager[CovarianceHooks | None]:
        """Gathers the moments of these blocks in its ``with``; does nothing where none are asked for."""
        return nullcontext() if self.moments is None else self.moments.gather(blocks)

    def state(self) -> dict[str, Any]:
        """What the work folder must know to go on from here, once all is synced; a copy."""
        return {"sink": self.sink.state()} | ({"moments": self.moments.state()} if self.moments is not None else {})

    def sync(self) -> None:
        """Everything that was delivered so far is on the disk when this returns."""
        self.sink.sync()
        if self.moments is not None:
            self.moments.sync()
