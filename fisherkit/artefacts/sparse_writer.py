"""Making a sparse delta (see artefacts.sparse_delta): entries are put aside tensor by tensor, and laid out at the end.

A run that was killed goes on with what it had put aside. numpy only.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisherkit.artefacts.sparse_delta import FORMAT, STRETCH, sidecar_of
from fisherkit.checkpoint.atomic import disk_errors, write_json
from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.errors import CheckpointError, ResumeError
from fisherkit.floats import STORED, Stored

_COPY_BYTES = 8 << 20


class Entries(NamedTuple):
    """Entries of a tensor that go into a sparse delta.

    Attributes:
        code: safetensors code of the tensor.
        size: entries of the whole tensor.
        indices: [n] flat places, ascending.
        values: [n] stored entries.
    """

    code: str
    size: int
    indices: NDArray[np.int64]
    values: Stored


class SparseWriter:
    """Puts entries aside in a work folder, and lays them out as a sparse delta at the end. Close it.

    Args:
        work: the work folder.
        state: what ``sync`` returned in an earlier process, whose entries are kept; None to begin afresh.

    Raises:
        ResumeError: the entries that the state speaks of are not there.
    """

    def __init__(self, work: Path, state: Mapping[str, Any] | None = None) -> None:
        self._raw = work / "entries.raw"
        self._specs: list[TensorSpec] = []
        with disk_errors(self._raw):
            self._file = self._raw.open("wb") if state is None else self._reopen(state)

    def _reopen(self, state: Mapping[str, Any]) -> Any:
        """Drop what was put aside after the state was taken, since the run will do it again."""
        try:
            self._specs = [TensorSpec(name, code, (count,)) for name, code, count in state["tensors"]]
        except (TypeError, ValueError) as error:
            raise ResumeError(f"{self._raw}: is not described by the run's progress; start over") from error
        if not self._raw.is_file() or self._raw.stat().st_size < state["bytes"]:
            raise ResumeError(f"{self._raw}: is not what the run had put aside; run without --resume to start over")
        file = self._raw.open("r+b")
        file.truncate(state["bytes"])
        file.seek(0, os.SEEK_END)
        return file

    def add(self, name: str, entries: Entries) -> None:
        """Put the entries of a tensor aside.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        if not entries.indices.size:
            return
        stretches = -(-entries.size // STRETCH)
        counts = np.bincount(entries.indices // STRETCH, minlength=stretches).astype(np.uint32)
        places = (entries.indices % STRETCH).astype(np.uint16)
        parts = (("value", entries.code, entries.values), ("place", "U16", places), ("count", "U32", counts))
        for suffix, code, data in parts:
            self._specs.append(TensorSpec(f"{name}.{suffix}", code, data.shape))
            with disk_errors(self._raw, data.nbytes):
                self._file.write(np.ascontiguousarray(data).view(np.uint8).data)

    def sync(self) -> dict[str, Any]:
        """Return when everything is on the disk; returns what another process needs to go on, as JSON values.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        with disk_errors(self._raw):
            self._file.flush()
            os.fsync(self._file.fileno())
            tensors = [[spec.name, spec.dtype, spec.shape[0]] for spec in self._specs]
            return {"bytes": self._file.tell(), "tensors": tensors}

    def close(self) -> None:
        """Close the file of entries."""
        with contextlib.suppress(OSError):  # what could not be written is of no use any more
            self._file.close()

    def stage(self, staging: Path, target: Path, about: Mapping[str, Any]) -> None:
        """Lay out the delta and the JSON beside it, under their final names.

        Args:
            staging: folder to make them in.
            target: what the delta will be called.
            about: goes into the JSON.

        Raises:
            CheckpointError: nothing was kept.
            OutputError: the disk is full or cannot be written.
        """
        with disk_errors(self._raw):
            self._file.flush()
        if not self._specs:
            raise CheckpointError(f"{target}: no entry was kept, so there is nothing to write")
        with StreamedWriter.create(target, self._specs, work=staging) as writer, self._raw.open("rb") as raw:
            for spec in self._specs:
                _copy(raw.fileno(), spec, writer)
            writer.seal()
        content = content_sha256(staging / target.name)
        made = {"format": FORMAT, "file": target.name, "content_sha256": content, **about}
        write_json(staging / sidecar_of(target).name, made)


def _copy(raw: int, spec: TensorSpec, writer: StreamedWriter) -> None:
    """Copy a tensor from where the open file ``raw`` stands."""
    kind, left = STORED[spec.dtype], spec.shape[0]
    done, step = 0, _COPY_BYTES // kind.itemsize
    while done < left:
        part = os.read(raw, min(step, left - done) * kind.itemsize)
        part += b"" if len(part) % kind.itemsize == 0 else os.read(raw, kind.itemsize - len(part) % kind.itemsize)
        if not part:
            raise CheckpointError("the entries put aside ended early; run it again")
        elements = np.frombuffer(part, kind)
        writer.write_stored(spec.name, elements, done)
        done += elements.size
    writer.mark_written([spec.name])
