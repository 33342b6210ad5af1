"""Storage of the mask of one weight: its entry in the JSON, its flags, eight of them to a byte.

The format itself is described in ``artefacts.mask_file``. numpy and the standard library only; knows no file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fisherkit.checkpoint.layout import TensorSpec
from fisherkit.checkpoint.schema import anything, flag, maybe, named, number, shape, table, text, whole

FORMAT = "fisherkit.mask/1"
_FIGURES = {"rank": maybe(whole()), "energy": maybe(number()), "effective_rank": maybe(number())}
_SUBSPACE_ROW = table({"shape": shape}, _FIGURES)
_COMMON = {"format": text(FORMAT), "file": text()}
_MORE = {
    "content_sha256": text(),
    "direction": maybe(text("train", "protect")),
    "options": named(anything),
    "fisher": maybe(named(anything)),
}
_MASK_ROW = table({"shape": shape, "over": maybe(whole(0, 63)), "packed": flag, "kept": whole()})
SCHEMAS = {
    "mask": table({**_COMMON, "kind": text("mask"), "tensors": named(_MASK_ROW)}, _MORE),
    "subspace": table({**_COMMON, "kind": text("subspace"), "tensors": named(_SUBSPACE_ROW)}, _MORE),
}
"""The JSON beside a mask, by kind; see checkpoint.schema."""

Kind = Literal["mask", "subspace"]
Direction = Literal["train", "protect"]
Flags = NDArray[np.bool_]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class MaskEntry:
    """Storage of the mask of one weight.

    Attributes:
        shape: the weight's.
        over: the axis along which one flag counts for all entries; None for a flag per entry.
        packed: eight flags to a byte.
        kept: entries of the weight that may change.
    """

    shape: Shape
    over: int | None = None
    packed: bool = False
    kept: int = 0

    def __post_init__(self) -> None:
        if self.over is not None and (self.packed or not 0 <= self.over < len(self.shape)):
            raise ValueError(f"a mask over axis {self.over} of {list(self.shape)}, packed: {self.packed}")

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of the weight's entries that may change."""
        return self.kept / self.numel if self.numel else 0.0

    @property
    def flags_shape(self) -> Shape:
        """Shape of the stored flags, before packing."""
        return tuple(size for axis, size in enumerate(self.shape) if axis != self.over)

    def spec(self, name: str) -> TensorSpec:
        """Return the tensor that holds it."""
        return (
            TensorSpec(name, "U8", (-(-self.numel // 8),))
            if self.packed
            else TensorSpec(name, "BOOL", self.flags_shape)
        )

    def to_json(self) -> dict[str, Any]:
        """Return its row of the JSON beside the file."""
        known = {"shape": list(self.shape), "over": self.over, "packed": self.packed}
        return {**known, "kept": self.kept, "density": self.density}


def entry(flags: Flags, shape: Sequence[int], *, over: int | None = None, packed: bool = False) -> MaskEntry:
    """Return the entry of flags that are about to be written for a weight of ``shape``.

    Raises:
        ValueError: the flags are not shaped as MaskEntry.flags_shape says.
    """
    plain = MaskEntry(tuple(shape), over, packed)
    if flags.shape != plain.flags_shape:
        raise ValueError(f"flags {list(flags.shape)} for a weight {list(shape)} over axis {over}")
    each = 1 if over is None else shape[over]
    return MaskEntry(plain.shape, over, packed, int(np.count_nonzero(flags)) * each)


def pack(flags: Flags) -> NDArray[np.uint8]:
    """Eight flags to a byte in memory order, the first in the lowest bit; the last byte is filled up with zeros."""
    return np.packbits(flags.reshape(-1), bitorder="little")


def unpack(packed: NDArray[np.uint8], shape: Sequence[int]) -> Flags:
    """Return the flags that ``pack`` packed.

    Raises:
        ValueError: another number of bytes than ``shape`` needs.
    """
    count = math.prod(shape)
    if packed.size != -(-count // 8):
        raise ValueError(f"{packed.size} bytes for {count} flags")
    return np.unpackbits(packed.reshape(-1), count=count, bitorder="little").view(np.bool_).reshape(tuple(shape))


def fit(flags: Flags, shape: Sequence[int]) -> Flags:
    """Flags of unknown kind as a view that is broadcastable to a weight of ``shape``.

    Raises:
        ValueError: see fit_shape.
    """
    return flags.reshape(fit_shape(flags.shape, tuple(shape)))


def fit_shape(flags: Shape, shape: Shape) -> Shape:
    """Return the shape in which flags of unknown kind are broadcastable to a weight of ``shape``.

    Those of the weight's own shape are taken as they are, and so are those with one entry along some axes; those that
    lack the last axis count for rows.

    Raises:
        ValueError: they fit in neither way.
    """
    if len(flags) == len(shape) and all(a in (1, b) for a, b in zip(flags, shape, strict=True)):
        return flags
    if flags and flags == shape[:-1]:
        return (*flags, 1)
    raise ValueError(f"a mask of {list(flags)} does not fit a weight of {list(shape)}")


def spans(modes: Sequence[Shape | None], weight: Shape) -> bool:
    """Return whether U, S and V of these shapes are modes of a weight of that shape; None is a part that is missing."""
    u, s, v = modes
    rank = next((part[-1] for part in modes if part), None)
    if len(weight) < 2 or rank is None or (u is None and v is None):
        return False
    wanted = ((*weight[:-1], rank), (*weight[:-2], rank), (*weight[:-2], weight[-1], rank))
    return all(part is None or part == full for part, full in zip((u, s, v), wanted, strict=True))


def header(
    kind: Kind,
    file: str,
    tensors: Mapping[str, MaskEntry],
    *,
    direction: Direction | None = None,
    options: Mapping[str, Any] | None = None,
    fisher: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON beside the mask file named ``file``; the writer may add keys of its own.

    Args:
        kind: of the file.
        file: its name, without folder.
        tensors: per weight; of a subspace only the shape counts.
        direction: whether the top was chosen to be trained or to be protected.
        options: what it was made with.
        fisher: provenance of the Fisher it was made from.
    """
    rows = {
        name: found.to_json() if kind == "mask" else {"shape": list(found.shape)} for name, found in tensors.items()
    }
    made = {"direction": direction, "options": dict(options or {}), "fisher": fisher}
    return {"format": FORMAT, "file": file, "kind": kind, **made, "tensors": rows}
