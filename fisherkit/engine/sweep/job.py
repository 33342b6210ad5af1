"""Job of an engine: model, samples, targets, and where finished values go."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherkit.checkpoint.tensor_source import TensorSource
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.checkpoint.work_folder import Work
from fisherkit.engine.covariance.hooks import CovarianceHooks
from fisherkit.engine.covariance.writer import CovarianceWriter
from fisherkit.engine.model.copies import send_small
from fisherkit.engine.model.plan import Plan, replays_of
from fisherkit.engine.ranks.ranks import ALONE, Ranks
from fisherkit.engine.sweep.feed import Feed
from fisherkit.engine.sweep.owners import owners_of
from fisherkit.engine.sweep.spool import Budget
from fisherkit.kernels.loss import sample_labels, sample_loss
from fisherkit.progress import Track


class Sink(Protocol):
    """Takes finished Fisher values; keeps them for good once synced."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take mean squared gradients by parameter name, float32; all measured parameters of a block come together."""

    def exchange(self, ranks: Ranks) -> None:
        """Bring what all ranks added since the last time to the first one."""

    def state(self) -> dict[str, Any]:
        """Return JSON that restores the sink as it is now, in another process; a copy."""

    def sync(self) -> None:
        """Wait until everything added so far is on the disk; may run beside later adds."""


@dataclass(kw_only=True)
class Job(Feed):
    """A measurement: model and samples, options and destination.

    ``samples`` are those of all ranks, ``batches`` this one's.

    Attributes:
        plan: targets and groups.
        work: folder where progress is noted.
        sink: takes finished values.
        budget: memory that boundaries may take before they are read back from disk.
        track: progress, called with stage, done and total.
        reduction: of the loss of a sample, ``mean`` or ``sum``.
        labels: ``data`` or ``sampled``.
        seed: of sampled labels.
        general: parameters to leave to autograd although a linear layer holds them.
        keep_weights: leave weights on the device between the two sweeps.
        covariances: gathers and writes covariances of activations; None where none are asked for.
        ranks: the processes that share the samples.
    """

    plan: Plan
    work: Work
    sink: Sink
    budget: Budget
    track: Track
    reduction: str = "mean"
    labels: str = "data"
    seed: int = 0
    keep_weights: bool = False
    general: frozenset[str] = field(default_factory=frozenset)
    covariances: CovarianceWriter | None = None
    ranks: Ranks = ALONE

    @contextmanager
    def open_source(self) -> Iterator[TensorSource]:
        """Open the checkpoint that the weights are read from."""
        assert self.skeleton.index is not None
        with Reader(self.skeleton.index) as reader:
            yield self.ranks.source(reader)

    @property
    def spools(self) -> Path:
        """Folder for what crosses the borders of groups."""
        return self.ranks.spools(self.work)

    def loss(self, number: int, logits: Tensor) -> Tensor:
        """Return the loss l_n of a sample from its logits [T, V]; labels are the data's, or drawn from the model."""
        sample = self.samples[number]
        counted = [place for place, counts in enumerate(sample.counts) if counts and place]
        both = send_small([*sample.ids, *counted], logits.device)
        labels, places = both[: len(sample.ids)], both[len(sample.ids) :]
        if self.labels == "sampled":
            labels = sample_labels(logits.detach(), labels, (self.seed * 1_000_003 + sample.row) % 2**63)
        return sample_loss(logits, labels, places, self.reduction)

    def accumulators(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return float32 zeros for each of these parameters, in one piece of memory."""
        shapes = {name: self.skeleton.model.get_parameter(name).shape for name in names}
        memory = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=self.device)
        parts = torch.split(memory, [shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def deliver(
        self, blocks: Sequence[int | None], sums: dict[str, Tensor], gathered: CovarianceHooks | None = None
    ) -> None:
        """Hand sums of squares to the sink as means over the samples, block by block, and covariances to their file.

        Each parameter's sums are those of all ranks then, and its owner's to hand on.
        """
        if gathered is not None and self.covariances is not None:
            self.covariances.keep(gathered)
        if self.ranks.size > 1:
            owners = owners_of(self.skeleton, self.plan, blocks, sums, self.ranks.size)
            self.ranks.reduce_(list(sums.values()), owners)
            sums = {
                name: one for (name, one), rank in zip(sums.items(), owners, strict=True) if rank == self.ranks.rank
            }
        for block in blocks:
            names = [name for name in self.plan.names([block]) if name in sums]
            own = {name: sums.pop(name).div_(len(self.samples)) for name in names}
            if own:
                self.sink.add(own)
        if self.ranks.size > 1:
            self.sink.exchange(self.ranks)

    def note(self, **progress: Any) -> None:
        """Note progress in the work folder, once what it speaks of is on every rank's disk."""
        self.ranks.meet("note")
        self.work.commit(**progress)

    def replays(self, blocks: Sequence[int]) -> list[list[str]]:
        """Return the parameters that are measured in each replay of these blocks."""
        return replays_of(self.skeleton, self.plan, blocks, covariances=self.covariances is not None)

    def gathering(self, blocks: Sequence[int | None]) -> AbstractContextManager[CovarianceHooks | None]:
        """Gather the covariances of these blocks in the ``with``; nothing where none are asked for."""
        return nullcontext() if self.covariances is None else self.covariances.gather(blocks)

    def state(self) -> dict[str, Any]:
        """Return what the work folder must know to go on from here, once all is synced; a copy."""
        values = self.sink.state()
        state = {"sink": values} if values.get("tensors") else {}
        if self.covariances is not None and self.covariances.is_laid_out:
            state["moments"] = self.covariances.state()
        return state

    def sync(self) -> None:
        """Wait until everything that was delivered so far is on the disk."""
        self.sink.sync()
        if self.covariances is not None:
            self.covariances.sync()
