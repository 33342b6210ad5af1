"""A subspace: the leading singular modes of a matrix per weight, which updates are then projected away from.

The matrix is, entry by entry,

- ``fisher``: F, as the Gemma 4 Masks card describes. A diagonal Fisher is close to rank 1, its modes are profiles of
  channels and not directions of gradients, and they protect little.
- ``sqrt-fisher``: sqrt(F).
- ``weight``: W (OPLoRA, arXiv 2510.13003; OSFT, arXiv 2504.07097).
- ``fisher-weight``: sqrt(F) W.
- ``delta``: W_ft - W, what an earlier fine-tune changed.

Axes are as stored: U [a, k] and V [b, k] for a weight [a, b]; fused experts [E, a, b] have modes of their own each, and
where one has fewer, columns of zeros. Modes are kept on disk until their numbers are known.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherkit.artefacts.mask_entry import MaskEntry, Shape
from fisherkit.checkpoint.atomic import disk_errors
from fisherkit.checkpoint.layout import TensorSpec
from fisherkit.checkpoint.writer import StreamedWriter
from fisherkit.engine.model.device import choose_device
from fisherkit.errors import CheckpointError, OptionError, some_names
from fisherkit.floats import Floats
from fisherkit.kernels.prune_scores import BLOCK
from fisherkit.kernels.subspace import Modes, modes_for_energy, top_modes
from fisherkit.methods.mask.binary import Masked
from fisherkit.methods.mask.scores import MaskInputs
from fisherkit.options import MaskOptions
from fisherkit.progress import Track


def write_subspace(out: Path, made_from: MaskInputs, options: MaskOptions, work: Path, track: Track) -> Masked:
    """Find the modes of every matrix and write them.

    Args:
        out: the subspace to make.
        made_from: the Fisher, and what the basis is made with.
        options: see MaskOptions.
        work: work folder, in which it is made.
        track: progress in weights.

    Raises:
        CheckpointError: values that are not finite, or a Fisher of nothing but zeros.
        OptionError: a rank that no matrix has, or no such device.
        OutputError: the disk is full.
    """
    basis = _Basis(made_from, options)
    names = [name for name in made_from.shapes if made_from.axes.axes(name) is not None and made_from.size(name)]
    _check_rank(made_from, names, options)
    spool = ArraySpool(work / "modes")
    details: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(names, start=1):
        found = _modes(basis, name, options)
        if any(len(part.s) for part in found):
            for side in _stored(made_from, name, options):
                spool.add(f"{name}.{side}", _stacked(found, side, made_from.shapes[name]))
            details[name] = _figures(found)
        track("finding modes", done, len(names))
    if not details:
        raise CheckpointError(f"{made_from.path}: every matrix is zero throughout: there is nothing to protect")
    unreached = tuple(name for name in names if name not in details) if basis.is_fisher else ()
    return as_written(spool.written(out, work), made_from, details, unreached, _notes(made_from, names, details))


def as_written(
    writer: StreamedWriter,
    made_from: MaskInputs,
    details: Mapping[str, dict[str, Any]],
    unreached: tuple[str, ...],
    notes: tuple[str, ...],
) -> Masked:
    """Return a subspace that was written, but not yet put in its place: directions of the weights in ``details``."""
    entries = {name: MaskEntry(made_from.shapes[name]) for name in details}
    return Masked(writer, entries, units=None, selected=None, unreached=unreached, notes=notes, details=details)


def _stored(made_from: MaskInputs, name: str, options: MaskOptions) -> str:
    """Parts that are stored: left is outputs, right inputs; U is of the axis before the last, V of the last."""
    axes, side = made_from.axes.axes(name), options.stored_side
    assert axes is not None
    if side == "both":
        return "USV"
    return "US" if (side == "left") == (axes.output < axes.input) else "SV"


class _Basis:
    """Matrices whose modes are taken."""

    def __init__(self, made_from: MaskInputs, options: MaskOptions) -> None:
        self._inputs = made_from
        self._kind = options.basis or "fisher"
        self.device = choose_device(options.device, float64=True)

    @property
    def is_fisher(self) -> bool:
        """True if it is zero where the Fisher is, and only there."""
        return self._kind in ("fisher", "sqrt-fisher")

    def matrices(self, name: str) -> list[torch.Tensor]:
        """Read the matrices [a, b] of a weight, float32: one, or one per expert."""
        height, width = self._inputs.shapes[name][-2:]
        return [self._matrix(name, n * height * width, height, width) for n in range(self._inputs.experts(name))]

    def _matrix(self, name: str, first: int, height: int, width: int) -> torch.Tensor:
        flat = np.empty(height * width, np.float32)
        for start in range(0, flat.size, BLOCK):
            stop = min(start + BLOCK, flat.size)
            flat[start:stop] = self._block(name, first + start, first + stop)
        return torch.from_numpy(flat.reshape(height, width)).to(self.device)

    def _block(self, name: str, start: int, stop: int) -> Floats:
        if self.is_fisher:
            f = self._inputs.fisher.block(name, start, stop)
            return f if self._kind == "fisher" else np.sqrt(f)
        assert self._inputs.weights is not None
        w = self._inputs.weights.block(name, start, stop)
        if self._kind == "fisher-weight":
            return np.asarray(np.sqrt(self._inputs.fisher.block(name, start, stop)) * w)
        if self._kind == "delta":
            assert self._inputs.delta is not None
            return np.asarray(self._inputs.delta.block(name, start, stop) - w)
        return w


def _modes(basis: _Basis, name: str, options: MaskOptions) -> list[Modes]:
    found = []
    for matrix in basis.matrices(name):
        if options.svd_rank is not None:
            found.append(top_modes(matrix, options.svd_rank))
        else:
            assert options.svd_energy is not None
            found.append(modes_for_energy(matrix, options.svd_energy))
    return found


def _stacked(found: list[Modes], side: str, shape: Shape) -> Floats:
    """One side of the modes of all matrices of a weight, filled up with zeros to the same number."""
    rank = max(len(modes.s) for modes in found)
    parts = []
    for modes in found:
        part = {"U": modes.u, "S": modes.s, "V": modes.v}[side].cpu()
        parts.append(torch.nn.functional.pad(part, (0, rank - part.shape[-1])))
    stacked = torch.stack(parts).numpy() if len(shape) > 2 else parts[0].numpy()
    return np.ascontiguousarray(stacked, np.float32)


def _figures(found: list[Modes]) -> dict[str, Any]:
    """Figures of a weight for the JSON: its modes, the energy they hold, and over how many the matrix spreads."""
    total = sum(modes.frobenius**2 for modes in found)
    return {
        "rank": max(len(modes.s) for modes in found),
        "energy": sum(modes.energy * modes.frobenius**2 for modes in found) / total,
        "effective_rank": sum(modes.effective_rank * modes.frobenius**2 for modes in found) / total,
    }


def _check_rank(made_from: MaskInputs, names: list[str], options: MaskOptions) -> None:
    if not names:
        raise CheckpointError(f"{made_from.path}: holds no matrices, and only these have directions")
    most = max(min(made_from.shapes[name][-2:]) for name in names)
    if options.svd_rank is not None and options.svd_rank > most:
        raise OptionError(
            f"--svd-rank {options.svd_rank} is above the smaller dimension of every matrix; at most {most}"
        )


def _notes(made_from: MaskInputs, names: list[str], details: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    found = []
    if zero := [name for name in names if name not in details]:
        found.append(f"zero throughout, so without directions to protect: {some_names(zero)}")
    if others := len(made_from.shapes) - len(names):
        found.append(f"left out, being no matrices: {others:,} of the Fisher's {len(made_from.shapes):,} tensors")
    if full := [name for name in details if min(made_from.shapes[name][-2:]) == details[name]["rank"]]:
        found.append(f"all directions are protected, so that these cannot change: {some_names(full)}")
    return tuple(found)


@dataclass(frozen=True)
class _Spooled:
    spec: TensorSpec
    start: int


class ArraySpool:
    """Arrays one after the other in a file, until all of their shapes are known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[_Spooled] = []
        self._end = 0

    def add(self, name: str, values: Floats) -> None:
        """Append an array.

        Args:
            name: of the tensor in the file.
            values: float32.
        """
        with disk_errors(self._path), self._path.open("ab") as file:
            values.tofile(file)
        self._held.append(_Spooled(TensorSpec(name, "F32", values.shape), self._end))
        self._end += values.nbytes

    def written(self, out: Path, work: Path) -> StreamedWriter:
        """Lay out everything that was added as a file; it is not yet put in its place.

        Args:
            out: the file to make.
            work: work folder, in which it is made.
        """
        writer = StreamedWriter.create(out, [one.spec for one in self._held], work=work)
        for one in self._held:
            count = math.prod(one.spec.shape)
            writer.write_stored(one.spec.name, np.fromfile(self._path, np.float32, count, offset=one.start))
        writer.mark_written(one.spec.name for one in self._held)
        return writer
