"""Density of a mask inside of its tensors: by attention head, or by bands of rows or columns.

Where every tensor of a mask has the same quota, a map of layers and modules has one colour. What varies then is where
in each tensor the quota lies. Brings numpy in.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fisherkit.artefacts.mask_entry import Flags
from fisherkit.artefacts.mask_file import MaskFile, open_mask
from fisherkit.artefacts.statistics import Entry
from fisherkit.checkpoint.names.order import in_model_order
from fisherkit.methods.inspect.summary import Summary

MOST_BANDS = 32

Axis = Literal["heads", "rows", "columns"]


@dataclass(frozen=True)
class Bands:
    """Densities of one module in every layer.

    Attributes:
        module: in the blocks.
        axis: what a band is: a head, or as many rows or columns.
        densities: by block number, the share of each band's weights that may change.
    """

    module: str
    axis: Axis
    densities: Mapping[int, tuple[float, ...]]


def mask_bands(summary: Summary) -> tuple[Bands, ...]:
    """Measure the bands of every module of a mask's blocks; nothing for other files, and for tensors of one axis.

    Reads the mask once more, tensor by tensor.

    Raises:
        CheckpointError: the mask is damaged.
    """
    if summary.kind != "mask":
        return ()
    size = _head_size(summary.provenance)
    found: dict[str, dict[int, tuple[float, ...]]] = {}
    axes: dict[str, Axis] = {}
    with open_mask(summary.path) as file:
        for entry, flags in _matrices(file, summary.entries):
            axis, lines = _lines(flags, entry.module, size)
            axes.setdefault(entry.module, axis)
            found.setdefault(entry.module, {})[entry.layer or 0] = _banded(lines, axis, size)
    return tuple(Bands(module, axes[module], found[module]) for module in in_model_order(found))


def _matrices(file: MaskFile, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Flags]]:
    """Yield the flags of tensors in the blocks, broadcastable to the weight; vectors and unknown shapes left out."""
    for entry in entries:
        if entry.layer is not None and entry.name in file.names:
            shape = file.shape(entry.name)
            if shape is not None and len(shape) > 1:
                yield entry, file.read(entry.name, shape)


def _head_size(provenance: Mapping[str, Any] | None) -> int | None:
    """Return the size of an attention head, where the Fisher that the mask was made from tells it."""
    model = ((provenance or {}).get("fisher") or {}).get("model") or {}
    size = model.get("head_dim")
    return size if isinstance(size, int) and size > 0 else None


def _lines(flags: Flags, module: str, size: int | None) -> tuple[Axis, NDArray[np.float64]]:
    """Return the density of every row, or of every column where rows are all alike, and what a band of them is."""
    by_column = flags.shape[-2] == 1 < flags.shape[-1]
    flat = flags.reshape(-1, *flags.shape[-2:])  # fused experts: [E, O, I]
    lines = flat.mean(axis=(0, 1)) if by_column else flat.mean(axis=2).reshape(-1)
    leaf = module.rpartition(".")[2]
    of_heads = leaf == "o_proj" if by_column else leaf in ("q_proj", "k_proj", "v_proj")
    if of_heads and size is not None and len(lines) % size == 0:
        return "heads", lines
    return ("columns" if by_column else "rows"), lines


def _banded(lines: NDArray[np.float64], axis: Axis, size: int | None) -> tuple[float, ...]:
    """Take the mean of each head's lines, or of each of at most MOST_BANDS nearly equal bands."""
    count = len(lines) // size if axis == "heads" and size is not None else min(MOST_BANDS, len(lines))
    return tuple(float(band.mean()) for band in np.array_split(lines, max(count, 1))) if len(lines) else ()
