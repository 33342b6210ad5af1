"""The staged file that several processes fill: each writes its tensors itself, where it sees the file system.

Where it does not, its tensors go to the first process, which writes them.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec

if TYPE_CHECKING:
    from types import TracebackType

    from fisherkit.engine.ranks.group import RankGroup


class SharedFile:
    """A StreamedWriter of several processes; a context.

    Args:
        writer: of this process; None where it does not see the file.
        specs: the tensors.
        ranks: the processes.
    """

    def __init__(self, writer: StreamedWriter | None, specs: Sequence[TensorSpec], ranks: "RankGroup") -> None:
        assert writer is not None or not ranks.is_first
        self._writer, self._ranks = writer, ranks
        self._dtypes = {spec.name: spec.torch_dtype for spec in specs}
        self._fresh: list[str] = []
        self._posted: list[tuple[str, Tensor]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: "TracebackType | None"
    ) -> None:
        self.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, rounded to its stored type, or keep it for ``exchange``."""
        if self._writer is None:
            self._posted.append((name, tensor.detach().to("cpu", self._dtypes[name])))
            return
        self._writer.write(name, tensor)
        self._fresh.append(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type that a tensor is stored in."""
        return self._dtypes[name]

    def exchange(self) -> None:
        """Let the first process know what was written since the last time, and send it what could not be written.

        All processes call it at the same point.
        """
        note: dict[str, Any] = {"posted": [(name, tuple(tensor.shape)) for name, tensor in self._posted]}
        if self._writer is not None:
            note["written"] = self._writer.checksums(self._fresh)
        notes = self._ranks.gather(note)
        for rank, one in enumerate(notes[1:], start=1):
            for place, (name, shape) in enumerate(one["posted"]):
                if rank == self._ranks.rank:
                    self._ranks.send(self._posted[place][1], 0)
                elif self._ranks.is_first:
                    received = torch.empty(shape, dtype=self._dtypes[name])
                    self._ranks.receive(received, rank)
                    self.write(name, received)
            if self._ranks.is_first and self._writer is not None:
                self._writer.mark_written(one.get("written", {}), one.get("written"))
        self._fresh, self._posted = [], []

    def mark_written(self, names: Iterable[str]) -> None:
        """Count tensors as written; see StreamedWriter."""
        if self._writer is not None:
            self._writer.mark_written(names)

    def sync(self) -> None:
        """Return when everything that this process has written is on the disk."""
        if self._writer is not None:
            self._writer.sync()

    def seal(self) -> tuple[str, ...]:
        """Complete the file, in the first process; see StreamedWriter."""
        assert self._writer is not None
        return self._writer.seal()

    def close(self) -> None:
        """Close the file; what is in the work folder stays."""
        if self._writer is not None:
            self._writer.close()
