"""What the engine may ask of the processes that share a run, and the answers of a process that is alone.

The engine says the same in both cases. Where a process is alone, every answer is there at once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fisherkit.checkpoint.tensor_source import TensorSource
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.checkpoint.work_folder import Work
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.ranks.shared_file import SharedFile
from fisherkit.progress import Say, Track

T = TypeVar("T")


class Ranks:
    """A process that measures alone.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        hosts: number of machines that they run on.
        neighbours: processes on this machine, this one included.
        remarks: what a person should know about how they work together.
    """

    rank = 0
    size = 1
    hosts = 1
    neighbours = 1
    remarks: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        """True for the process that speaks, and that owns the progress and the files at the end."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """Return the device of this process, where the option alone says ``chosen``."""
        return chosen

    def gather(self, item: T) -> list[T]:
        """Return every process's item (anything that pickles), in order of their ranks."""
        return [item]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what ``make`` gives in the first process; it is called there alone."""
        return make()

    def least(self, value: int) -> int:
        """Return the smallest of all processes' numbers."""
        return min(self.gather(value))

    def total(self, value: float) -> float:
        """Return the sum of all processes' numbers, added in order of their ranks."""
        return sum(self.gather(value))

    def meet(self, name: str) -> None:
        """Return when all processes have come here; any thread may call it, but each name belongs to one."""

    def together(self) -> AbstractContextManager[None]:
        """Raise an error from inside the ``with`` in all processes, once all of them have left it."""
        return nullcontext()

    def agreeing(self) -> AbstractContextManager[None]:
        """Raise a finding (engine.model.findings) from inside the ``with`` in all processes, once all have left it."""
        return nullcontext()

    def guarding(self) -> AbstractContextManager[None]:
        """Tell the other processes at once of what goes wrong inside the ``with``."""
        return nullcontext()

    def share(self, nbytes: int, device: torch.device) -> int:
        """Return the bytes that each process may take, of those free on a device; the same in all processes."""
        return nbytes

    def own_samples(self, lengths: Sequence[int]) -> list[int]:
        """Return which samples, of so many tokens each, this process measures; none where there are too few."""
        return list(range(len(lengths)))

    def reduce_(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Add each tensor up over all processes, in the memory of its owner; the others' are spent afterwards.

        Args:
            tensors: contiguous, the same shapes in the same order everywhere.
            owners: rank that owns each of them.
        """

    def source(self, source: Reader) -> TensorSource:
        """Return a source that reads together with the other processes of this machine."""
        return source

    def open_file(
        self, target: Path, specs: Sequence[TensorSpec], *, work: Path, again: bool, **layout: Any
    ) -> StreamedWriter | SharedFile:
        """Open the file that all processes fill; see StreamedWriter.

        Args:
            target: what it will become.
            specs: the tensors.
            work: folder that it is staged in.
            again: it was laid out by an earlier run.
            layout: more arguments of StreamedWriter.
        """
        return (StreamedWriter.reopen if again else StreamedWriter.create)(target, specs, work=work, **layout)

    def drop_spools(self, work: Work) -> None:
        """Remove the folder of ``spools`` where the work folder does not take it along."""

    def share_work(self, work: Work | None, folder: Path) -> Work:
        """Return this process's view of the work folder, which the first one has opened.

        Args:
            work: in the first process.
            folder: its place.
        """
        assert work is not None
        return work

    def spools(self, work: Work) -> Path:
        """Return the folder where this process keeps what crosses the borders of groups."""
        return work.folder

    def say(self, say: Say) -> Say:
        """Return a function that remarks for people go to; only the first process speaks."""
        return say

    def track(self, track: Track) -> Track:
        """Return a progress function that also looks whether another process has failed."""
        return track

    def described(self) -> Mapping[str, int]:
        """Return what the sidecar says about the processes; nothing of one alone."""
        return {}


ALONE = Ranks()
