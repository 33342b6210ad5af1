"""File of covariances: laid out once the shared inputs are known, then filled group by group."""

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
    Form,
    Layer,
    SharedInputProbe,
    SharedInputs,
    layers_of,
    plan_covariances,
    probe_on_meta,
)
from fisherkit.engine.model.plan import Plan
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.engine.ranks.ranks import ALONE, Ranks
from fisherkit.engine.ranks.shared_file import SharedFile


class CovarianceWriter:
    """Probes, gathers and writes the covariances of one run; a context.

    Args:
        skeleton: the model.
        plan: its targets.
        target: the file, beside the Fisher; nothing is there before the work folder's owner puts it there.
        work: the work folder.
        device: where sums are kept.
        form: which covariances, and how they are stored.
        ranks: processes that gather them together.

    Attributes:
        shared_inputs: of the layers that are known so far.
        knows_shared_inputs: they are known of all layers, without a batch that runs through them.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        target: Path,
        work: Path,
        device: torch.device,
        form: Form,
        ranks: Ranks = ALONE,
    ) -> None:
        self._form = form
        self._skeleton, self._plan, self._device = skeleton, plan, device
        self._target, self._work, self._ranks = target, work, ranks
        self._writer: StreamedWriter | SharedFile | None = None
        self._general: frozenset[str] = frozenset()
        self.shared_inputs: SharedInputs = {}
        self.knows_shared_inputs = False
        self.covariances: list[Covariance] = []
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
            progress: of the work folder; its keys ``heard`` (shared inputs) and ``moments`` are this class's.
        """
        self.__exit__(None, None, None)
        self._writer, self._general = None, general
        state = progress.get("moments", {})
        known = None if state else probe_on_meta(self._skeleton, self._plan, general)
        self.knows_shared_inputs = bool(state) or known is not None
        self.shared_inputs = {**(known or {}), **state.get("heard", progress.get("heard", {}))}
        self.figures = dict(state.get("figures", {}))
        self.covariances = self._planned()  # or refuse now
        if state:
            self._writer = self._ranks.open_file(self._target, self._specs(), work=self._work, again=True)
            self._writer.mark_written(self.figures)

    @property
    def is_laid_out(self) -> bool:
        """True once all shared inputs are known and the file has its size."""
        return self._writer is not None

    @contextmanager
    def probing(self, blocks: Sequence[int]) -> Iterator[None]:
        """Find the shared inputs of these blocks while one batch runs through them inside of the ``with``."""
        if self.knows_shared_inputs:
            yield
            return
        with SharedInputProbe(self._layers(blocks)) as probe:
            yield
        self.shared_inputs |= probe.shared_inputs

    def lay_out(self) -> None:
        """Make room for all covariances; the shared inputs of all blocks are known, if only to the first rank.

        Raises:
            OutputError: no room on the disk.
        """
        self.shared_inputs = self._ranks.gather(self.shared_inputs)[0]  # a rank without samples saw none
        self.covariances = self._planned()
        self._writer = self._ranks.open_file(self._target, self._specs(), work=self._work, again=False)

    def gather(self, blocks: Sequence[int | None]) -> CovarianceHooks:
        """Return hooks with accumulators for the covariances of some blocks."""
        own = [block for block in blocks if block is not None]
        covariances = [covariance for covariance in self.covariances if covariance.block in own]
        return CovarianceHooks(self._layers(own), covariances, self._device, self._skeleton.model.get_parameter)

    def keep(self, gathered: CovarianceHooks) -> None:
        """Write finished covariances to the file, each in the rank that owns it."""
        assert self._writer is not None
        gathered.reduce(self._ranks)
        finished = {}
        for covariance, values, figures in gathered.results():
            self._writer.write(covariance.name, values.to("cpu"))
            finished[covariance.name] = figures
        if isinstance(self._writer, SharedFile):
            self._writer.exchange()
        for figures_of_rank in self._ranks.gather(finished):
            self.figures |= figures_of_rank

    def state(self) -> dict[str, Any]:
        """Return JSON that ``begin`` takes under ``moments`` in another process, once all is synced; a copy."""
        return {"heard": dict(self.shared_inputs), "figures": dict(self.figures)}

    def sync(self) -> None:
        """Wait until everything kept before the call is on the disk."""
        if self._writer is not None:
            self._writer.sync()

    def described(self) -> dict[str, dict[str, Any]]:
        """Return an entry for every covariance, as the JSON beside the file has it."""
        return {
            covariance.name: {
                "side": covariance.side,
                "tensors": list(covariance.tensors),
                "layer": covariance.block,
                "size": covariance.size,
                "sketch_rank": covariance.rank,
                "dtype": covariance.code,
                **self.figures[covariance.name],
            }
            for covariance in self.covariances
        }

    def _layers(self, blocks: Sequence[int]) -> dict[str, Layer]:
        return layers_of(self._skeleton, self._plan, self._general, blocks)

    def _planned(self) -> list[Covariance]:
        return plan_covariances(self._skeleton, self._plan, self._general, self.shared_inputs, self._form)

    def _specs(self) -> list[TensorSpec]:
        return [covariance.spec for covariance in self.covariances]
