"""A sparse delta: the entries of a fine-tune that were kept, as places and values, without the base around them.

A `.safetensors` file; for each tensor NAME with kept entries

- ``NAME.value``: the kept entries in the base's type, in memory order: values to put there, nothing to add;
- ``NAME.place``: U16, where each lies in its stretch of 65,536 entries of the flat tensor;
- ``NAME.count``: U32, how many entries each stretch has.

``<stem>.json`` beside it says which base they belong to. 4 bytes per kept entry in bf16: at density 0.1 a fifth of the
base's size, at 0.005 a hundredth. numpy only.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fisherkit.artefacts.fisher_sidecar import check_owned
from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import CheckpointIndex, open_index
from fisherkit.checkpoint.schema import anything, named, read_beside, read_object, table, text
from fisherkit.errors import CheckpointError
from fisherkit.floats import Stored

FORMAT = "fisherkit.delta/1"
STRETCH = 1 << 16
_PARTS = (".value", ".place", ".count")


SCHEMA = table(
    {"format": text(FORMAT), "file": text(), "base_fingerprint": text()},
    {"content_sha256": text(), "base": text(), "made": named(anything)},
)
"""The JSON beside a sparse delta; see checkpoint.schema."""


def sidecar_of(path: Path) -> Path:
    """Return where the JSON beside a sparse delta lies."""
    return path.with_suffix(".json")


def is_sparse_delta(path: Path) -> bool:
    """Return whether a file is one that this module wrote.

    Raises:
        CheckpointError: its tensors are those of one, and the JSON beside it is not there, or another's.
    """
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    about = read_beside(sidecar_of(path)) or {}
    if about.get("format") == FORMAT and about.get("file") == path.name:
        return True
    if all(name.endswith(_PARTS) for name in open_index(path).tensors):
        raise CheckpointError(
            f"{path}: is a sparse delta without its {sidecar_of(path).name}; put that beside it, named as it was made"
        )
    return False


def check_sidecar(path: Path) -> None:
    """Refuse a target beside which a JSON lies that is not its own; called before any work.

    Raises:
        OutputError: see above.
    """
    check_owned(sidecar_of(path), "file", path, "the facts")


class SparseDelta:
    """Reads a sparse delta and puts it into tensors of its base; a context.

    Args:
        path: the ``.safetensors`` file; its JSON lies beside it.
        base: the checkpoint that it was made for.

    Raises:
        CheckpointError: made for another base, not described by its JSON, or its tensors cannot belong to the base's.
    """

    def __init__(self, path: Path, base: CheckpointIndex) -> None:
        about = read_object(sidecar_of(path), "a sparse delta", SCHEMA, "make the delta anew")
        if about["base_fingerprint"] != base.fingerprint():
            raise CheckpointError(
                f"{path}: was made for another base ({about.get('base', 'unknown')}) than {base.path}; its entries are "
                "values that replace those of that very checkpoint"
            )
        index = open_index(path)
        if "content_sha256" in about and about["content_sha256"] != index.fingerprint():
            raise CheckpointError(f"{sidecar_of(path)}: describes another file than this {path.name}; make both anew")
        self._path = path
        self._base = base
        self.names = tuple(name for name in base.tensors if f"{name}.value" in index.tensors)
        if index.tensors.keys() != {name + part for name in self.names for part in _PARTS}:
            raise CheckpointError(f"{path}: holds tensors that {base.path} does not have; fetch both again")
        for name in self.names:
            self._check_layout(index, name)
        self._reader = ArrayReader(index)

    def _check_layout(self, index: CheckpointIndex, name: str) -> None:
        """Hold types and lengths of a tensor's three parts against each other and the base."""
        info = self._base.tensors[name]
        value, place, count = (index.tensors[name + part] for part in _PARTS)
        kept = value.shape[0] if len(value.shape) == 1 else -1
        stretches = -(-info.numel // STRETCH)
        wanted = [(info.dtype, (kept,)), ("U16", (kept,)), ("U32", (stretches,))]
        if [(part.dtype, part.shape) for part in (value, place, count)] != wanted or kept > info.numel:
            raise self._unfit(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, at)

    def apply(self, name: str, out: Stored) -> None:
        """Put the entries of a tensor into the flat ``out``, which holds the base's.

        Raises:
            CheckpointError: places lie outside of the tensor, twice, or out of order.
        """
        out[self.indices(name)] = self._reader.read(f"{name}.value")

    def indices(self, name: str) -> NDArray[np.int64]:
        """Return the flat indices of the kept entries, ascending.

        Raises:
            CheckpointError: they lie outside of the tensor, twice, or out of order.
        """
        counts = self._reader.read(f"{name}.count").astype(np.int64)
        places = self._reader.read(f"{name}.place").astype(np.int64)
        if int(counts.sum()) != places.size:
            raise self._unfit(name)
        found = np.repeat(np.arange(counts.size, dtype=np.int64) * STRETCH, counts) + places
        if found.size and (found[-1] >= self._base.tensors[name].numel or not (np.diff(found) > 0).all()):
            raise self._unfit(name)
        return found

    def _unfit(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: the entries of {name!r} are not what a tensor of this base can have; fetch the file again"
        )

    def fingerprint(self) -> str:
        """Return the fingerprint of its tensors, see CheckpointIndex.fingerprint."""
        return self._reader.index.fingerprint()
