"""A pair of checkpoints: BASE, and what was fine-tuned from it in any of the forms that people keep it in.

FT may be a checkpoint of another layout, a PEFT adapter, or a sparse delta that fapm wrote; all of them
answer with whole tensors in BASE's names and shapes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fisherkit.artefacts.sparse_delta import SparseDelta, is_sparse_delta
from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.hub import ModelSource, resolve_model
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.lora.adapter import Adapter, is_adapter
from fisherkit.checkpoint.matching.pairing import pair
from fisherkit.errors import CheckpointError
from fisherkit.floats import STORED, Stored, widen
from fisherkit.pairs.parallel import BlockPool, BufferPool


class Tuned(Protocol):
    """A fine-tune of BASE.

    Attributes:
        kind: ``checkpoint``, ``adapter`` or ``delta``.
        names: BASE's tensors that it has values for, in BASE's order.
        dropped: its own tensors that have no place in BASE.
        notes: what a person should know about how the two were matched.
        tied_pairs: heads by name, with the embedding that both checkpoints tie each to and store twice.
        untied: the output stores a head and an embedding that may differ, so its config must not tie them.
    """

    kind: str
    names: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    tied_pairs: Mapping[str, str]
    untied: bool

    def code(self, name: str) -> str:
        """Return the safetensors code of the values of a tensor."""
        ...

    def load(self, name: str, base: Stored, pool: BlockPool, buffers: BufferPool) -> Stored:
        """Read its values of a tensor, flat; valid until the next call.

        Args:
            name: one of ``names``.
            base: BASE's values, flat, which an adapter adds to.
            pool: threads.
            buffers: memory to read into.
        """
        ...

    def prefetch(self, name: str) -> None:
        """Have the system read ahead."""
        ...

    def fingerprint(self) -> str:
        """Return a text that changes when the values do."""
        ...


@dataclass(frozen=True)
class Pair:
    """BASE and FT, opened and matched."""

    base_source: ModelSource
    base: ArrayReader
    tuned_source: ModelSource
    tuned: Tuned


@contextmanager
def open_pair(base: str, tuned: str) -> Iterator[Pair]:
    """Open and match two checkpoints.

    Args:
        base: a checkpoint: folder, file, ``org/name`` or ``org/name@revision``.
        tuned: the same, or a PEFT adapter's folder, or a file that ``fapm --sparse`` wrote.

    Raises:
        CheckpointError: one of them cannot be read, or they do not belong together.
    """
    base_source, tuned_source = resolve_model(base), resolve_model(tuned)
    if base_source.path.resolve() == tuned_source.path.resolve():
        raise CheckpointError(f"{tuned_source.path}: BASE and FT are the same; give the fine-tuned one second")
    if is_adapter(base_source.path):
        raise CheckpointError(f"{base_source.path}: is an adapter; BASE is the model that it was trained on")
    if is_sparse_delta(base_source.path):
        raise CheckpointError(f"{base_source.path}: is a sparse delta; BASE is the model that it was made for")
    base_index = open_index(base_source.path)
    with ExitStack() as stack:
        reader = stack.enter_context(ArrayReader(base_index))
        opened: Tuned
        if is_adapter(tuned_source.path):
            adapter = Adapter.open(tuned_source.path, base_index)
            stack.callback(adapter.close)
            opened = _TunedAdapter(adapter, reader)
        elif is_sparse_delta(tuned_source.path):
            opened = _TunedDelta(stack.enter_context(SparseDelta(tuned_source.path, base_index)), reader)
        else:
            opened = _TunedCheckpoint(
                base_source.path,
                reader,
                tuned_source.path,
                stack.enter_context(ArrayReader(open_index(tuned_source.path))),
            )
        yield Pair(base_source, reader, tuned_source, opened)


class _TunedCheckpoint:
    kind = "checkpoint"

    def __init__(self, base_path: Path, base: ArrayReader, path: Path, reader: ArrayReader) -> None:
        self._pairing = pair(base.index, reader.index, base_folder=_folder(base_path), tuned_folder=_folder(path))
        self._reader = reader
        self._base = base
        self.names = self._pairing.matched
        self.dropped = self._pairing.tuned_only
        self.notes = self._pairing.notes
        self.tied_pairs = self._pairing.tied_pairs
        self.untied = self._pairing.untied

    def code(self, name: str) -> str:
        return self._pairing.code(name)

    def load(self, name: str, base: Stored, pool: BlockPool, buffers: BufferPool) -> Stored:
        out = buffers.take("tuned", base.size, STORED[self.code(name)])
        pool.transfer(out, lambda part, start: self._pairing.read_into(name, self._reader, part, start))
        return out

    def prefetch(self, name: str) -> None:
        self._pairing.prefetch(name, self._reader)

    def fingerprint(self) -> str:
        return self._reader.index.fingerprint()


class _TunedAdapter:
    kind = "adapter"

    def __init__(self, adapter: Adapter, base: ArrayReader) -> None:
        self._adapter = adapter
        self._base = base
        self.names = adapter.touched
        self.dropped: tuple[str, ...] = ()
        self.notes = adapter.notes
        self.tied_pairs: Mapping[str, str] = {}
        self.untied = False

    def code(self, name: str) -> str:
        return "F32"

    def load(self, name: str, base: Stored, pool: BlockPool, buffers: BufferPool) -> Stored:
        info = self._base.info(name)
        return self._adapter.apply(name, widen(base, info.dtype).reshape(info.shape)).reshape(-1)

    def prefetch(self, name: str) -> None:
        """Factors are small, and in memory."""

    def fingerprint(self) -> str:
        return self._adapter.fingerprint()


class _TunedDelta:
    kind = "delta"

    def __init__(self, delta: SparseDelta, base: ArrayReader) -> None:
        self._delta = delta
        self._base = base
        self.names = delta.names
        self.dropped: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.tied_pairs: Mapping[str, str] = {}
        self.untied = False

    def code(self, name: str) -> str:
        return self._base.info(name).dtype

    def load(self, name: str, base: Stored, pool: BlockPool, buffers: BufferPool) -> Stored:
        out = buffers.take("tuned", base.size, base.dtype)
        out[:] = base
        self._delta.apply(name, out)
        return out

    def prefetch(self, name: str) -> None:
        """Read when it is needed."""

    def fingerprint(self) -> str:
        return self._delta.fingerprint()


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
