"""The file of second moments: laid out once it is known what there is to gather, then filled group by group."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.covariance.hooks import CovarianceHooks
from fisherkit.engine.covariance.plan import (
    Covariance,
    Layer,
    SharedInputProbe,
    SharedInputs,
    layers_of,
    plan_covariances,
)
from fisherkit.engine.model.plan import Plan
from fisherkit.engine.model.skeleton import Skeleton


class CovarianceWriter:
    """Hears, gathers and writes the moments of one run; a context.

    Args:
        skeleton: the model.
        plan: its targets.
        target: the file, beside the Fisher; nothing is there before the work folder's owner puts it there.
        work: the work folder.
        device: where sums are kept.
    """

    def __init__(self, skeleton: Skeleton, plan: Plan, target: Path, work: Path, device: torch.device) -> None:
        self._skeleton, self._plan, self._device = skeleton, plan, device
        self._target, self._work = target, work
        self._writer: StreamedWriter | None = None
        self._general: frozenset[str] = frozenset()
        self.shared_inputs: SharedInputs = {}
        self.moments: list[Covariance] = []
        self.figures: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def begin(self, general: frozenset[str], progress: Mapping[str, Any]) -> None:
        """Start over, or go on from an earlier process's progress.

        Args:
            general: parameters that are left to autograd.
            progress: the work folder's; ``heard`` and ``moments`` are ours.
        """
        self.__exit__(None, None, None)
        self._writer, self._general = None, general
        state = progress.get("moments", {})
        self.shared_inputs = dict(state.get("heard", progress.get("heard", {})))
        self.figures = dict(state.get("figures", {}))
        self.moments = plan_covariances(self._skeleton, self._plan, general, self.shared_inputs)  # or complain now
        if state:
            self._writer = StreamedWriter.reopen(self._target, self._specs(), work=self._work)
            self._writer.mark_written(self.figures)

    @property
    def is_laid_out(self) -> bool:
        """Whether all was heard."""
        return self._writer is not None

    @contextmanager
    def probing(self, blocks: Sequence[int]) -> Iterator[None]:
        """One batch runs through these blocks inside of the ``with``."""
        with SharedInputProbe(self._layers(blocks)) as probe:
            yield
        self.shared_inputs |= probe.shared_inputs

    def lay_out(self) -> None:
        """All blocks were heard: make room for what they will give.

        Raises:
            OutputError: no room on the disk.
        """
        self.moments = plan_covariances(self._skeleton, self._plan, self._general, self.shared_inputs)
        self._writer = StreamedWriter.create(self._target, self._specs(), work=self._work)

    def gather(self, blocks: Sequence[int | None]) -> CovarianceHooks:
        """Accumulators for the moments of some blocks."""
        own = [block for block in blocks if block is not None]
        moments = [moment for moment in self.moments if moment.block in own]
        return CovarianceHooks(self._layers(own), moments, self._device)

    def keep(self, gathered: CovarianceHooks) -> None:
        """Write what was gathered."""
        assert self._writer is not None
        for moment, values, figures in gathered.results():
            self._writer.write(moment.name, values.to("cpu"))
            self.figures[moment.name] = figures

    def state(self) -> dict[str, Any]:
        """JSON that ``begin`` takes under ``moments`` in another process, once what was kept is synced; a copy."""
        return {"heard": dict(self.shared_inputs), "figures": dict(self.figures)}

    def sync(self) -> None:
        """Everything kept before the call is on the disk when this returns."""
        if self._writer is not None:
            self._writer.sync()

    def described(self) -> dict[str, dict[str, Any]]:
        """Every moment, as the JSON beside the file has it."""
        return {
            moment.name: {
                "side": moment.side,
                "tensors": list(moment.tensors),
                "layer": moment.block,
                "size": moment.size,
                "sketch_rank": moment.rank,
                **self.figures[moment.name],
            }
            for moment in self.moments
        }

    def _layers(self, blocks: Sequence[int]) -> dict[str, Layer]:
        return layers_of(self._skeleton, self._plan, self._general, blocks)

    def _specs(self) -> list[TensorSpec]:
        return [moment.spec for moment in self.moments]
