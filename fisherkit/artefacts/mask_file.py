"""Mask files: which entries of each weight may change (1 = may change), or which directions are protected.

A `.safetensors` file and ``<stem>.json`` beside it. For a weight NAME of shape S the file holds one of

- vector mask: BOOL tensor NAME, shaped S without the axis ``over``, along which one flag counts for all entries. Rows
  of [out, in]: [out], over 1. Columns: [in], over 0. Rows of fused experts [E, 2I, H]: [E, 2I], over 2.
- element mask: BOOL tensor NAME of shape S; or packed, U8 of ceil(n / 8) bytes: entry 8j + i is bit i of byte j.
- subspace: F32 NAME.U [..., a, k], NAME.S [..., k], NAME.V [..., b, k] for S = [..., a, b], as the weight is stored;
  U and V have orthonormal columns, one of them may be missing.

Without the JSON, BOOL tensors and subspaces can still be read: the weight's shape decides what they mean. numpy and the
standard library only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from fisherkit.artefacts.mask_entry import (
    FORMAT,
    SCHEMAS,
    Direction,
    Flags,
    Kind,
    MaskEntry,
    Shape,
    entry,
    fit,
    header,
    pack,
    spans,
    unpack,
)
from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.headers import TensorInfo
from fisherkit.checkpoint.index import CheckpointIndex, open_index
from fisherkit.checkpoint.schema import check, parse_file
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.floats import Floats, widen
from fisherkit.options import check_pull

__all__ = ["FORMAT", "MaskEntry", "MaskFile", "StoredModes", "entry", "fit", "header", "open_mask", "pack", "unpack"]

SIDES = ("U", "S", "V")


class StoredModes(NamedTuple):
    """Singular modes of one weight [..., a, b]: u [..., a, k], s [..., k], v [..., b, k]; None where not stored."""

    u: Floats | None
    s: Floats | None
    v: Floats | None


def open_mask(path: str | Path) -> "MaskFile":
    """Open a mask or subspace; reads no tensor yet.

    Raises:
        CheckpointError: nothing there, damaged, no mask, or the JSON beside it belongs to another file.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    index = open_index(path)
    if not beside.is_file():
        return MaskFile(index, *_guess(index), {})
    made = parse_file(beside, "the description of a mask")
    kind = made.get("kind") if isinstance(made, dict) else None
    rule = SCHEMAS["subspace" if kind == "subspace" else "mask"]
    check(beside, made, "a mask", rule, "make the mask anew, or take the JSON away")
    return MaskFile(index, *_described(index, beside, made), made)


class MaskFile:
    """An open mask file; any number of threads may read. Made by ``open_mask``; close it after the last read.

    Attributes:
        path: the tensors' file.
        kind: ``mask`` or ``subspace``.
        names: the weights it speaks of, by checkpoint name, in the file's order.
        made: the JSON beside the file without its tensors: direction, options, provenance; empty where there is none.
    """

    def __init__(
        self, index: CheckpointIndex, kind: Kind, entries: Mapping[str, MaskEntry | None], made: Mapping[str, Any]
    ) -> None:
        self.path = index.path
        self.kind = kind
        self.names = tuple(entries)
        self.made = {key: value for key, value in made.items() if key != "tensors"}
        self._entries = entries
        self._reader = ArrayReader(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.__exit__(None, None, None)

    @property
    def direction(self) -> Direction | None:
        """Direction: the top was chosen to be trained or to be protected; None where nothing says so."""
        found = self.made.get("direction")
        return found if found in ("train", "protect") else None

    @property
    def options(self) -> Mapping[str, Any]:
        """Options that it was made with."""
        found = self.made.get("options")
        return found if isinstance(found, Mapping) else {}

    @property
    def pull(self) -> float | None:
        """Pull of a soft subspace over a whole course, see kernels.pull; None for a hard one.

        Raises:
            CheckpointError: what the JSON says is no pull, or one per step, or there is none where there has to be.
        """
        if self.kind == "subspace" and not self.made and any(self._may_be_soft(name) for name in self.names):
            name = self.path.with_suffix(".json").name
            raise CheckpointError(
                f"{self.path}: {name}, which says whether its directions are protected softly, is missing; put it "
                "beside the subspace"
            )
        found, beside = self.options.get("pull"), self.path.with_suffix(".json")
        try:
            if found is not None:
                check_pull(found)
        except OptionError:
            raise CheckpointError(f"{beside}: {found!r} is no pull; make the subspace anew") from None
        if found is not None and self.options.get("pull_per") != "course":
            raise CheckpointError(
                f"{beside}: its pull of {found} is one per step, and what is meant now is one per course; make the "
                "subspace anew"
            )
        return found

    @property
    def fisher(self) -> Mapping[str, Any] | None:
        """Provenance of the Fisher it was made from."""
        return self.made.get("fisher")

    def entry(self, name: str) -> MaskEntry | None:
        """Shape, layout and count of one weight's mask; None where only the weight itself can tell.

        Raises:
            CheckpointError: no such weight here.
        """
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: has nothing for the weight {name!r}")
        return self._entries[name]

    def shape(self, name: str) -> Shape | None:
        """Shape of the weight; None where only the weight itself can tell."""
        found = self.entry(name)
        return found.shape if found else None

    def read(self, name: str, shape: Sequence[int] | None = None) -> Flags:
        """Read the mask of one weight, broadcastable to it: with size 1 at the axis that it is over.

        Args:
            name: the weight.
            shape: the weight's shape, which the mask is held against. Without it and without a JSON beside the file,
                the flags come as they are stored.

        Raises:
            CheckpointError: no such mask, a subspace, damaged, or made for a weight of another shape.
        """
        self._expect("mask")
        found = self.entry(name)
        flags = self._flags(name, found)
        if shape is None:
            return flags
        if found is not None and found.shape != tuple(shape):
            raise CheckpointError(self._misfit(name, found.shape, shape))
        try:
            return fit(flags, shape)
        except ValueError:
            raise CheckpointError(self._misfit(name, flags.shape, shape)) from None

    def modes(self, name: str, shape: Sequence[int] | None = None) -> StoredModes:
        """Read the protected directions of one weight, float32.

        Args:
            name: the weight.
            shape: the weight's shape, which the modes are held against.

        Raises:
            CheckpointError: no such modes, a mask, damaged, or made for a weight of another shape.
        """
        self._expect("subspace")
        known = self.shape(name)
        held = self._reader.index.tensors
        found = StoredModes(*(self._mode(f"{name}.{side}") if f"{name}.{side}" in held else None for side in SIDES))
        if shape is not None and ((known or tuple(shape)) != tuple(shape) or not _spans(found, tuple(shape))):
            raise CheckpointError(self._misfit(name, known or _spanned(found), shape))
        return found

    def has_sides(self, name: str) -> tuple[bool, bool]:
        """Return, for U and for V, whether a weight has it."""
        held = self._reader.index.tensors
        return f"{name}.U" in held, f"{name}.V" in held

    def _may_be_soft(self, name: str) -> bool:
        """Return whether there is a spectrum and one side."""
        return f"{name}.S" in self._reader.index.tensors and sum(self.has_sides(name)) == 1

    def kept(self, name: str) -> int:
        """Entries of one weight that may change; read from the tensor where nothing else says so."""
        found = self.entry(name)
        return int(np.count_nonzero(self.read(name))) if found is None else found.kept

    def _flags(self, name: str, found: MaskEntry | None) -> Flags:
        stored = self._reader.read(name).view(np.uint8)
        flags = unpack(stored, found.shape) if found is not None and found.packed else np.not_equal(stored, 0)
        if found is None:
            return flags
        if entry(flags, found.shape, over=found.over, packed=found.packed).kept != found.kept:
            raise CheckpointError(f"{self.path}: {name} is damaged: not the {found.kept:,} entries its JSON counts")
        return flags if found.over is None else np.expand_dims(flags, found.over)

    def _mode(self, tensor: str) -> Floats:
        values = widen(self._reader.read(tensor), self._reader.info(tensor).dtype)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: {tensor} holds values that are NaN or infinite; make it anew")
        return values

    def _expect(self, kind: Kind) -> None:
        if self.kind != kind:
            raise CheckpointError(f"{self.path}: is a {self.kind}, where a {kind} is needed")

    def _misfit(self, name: str, found: Sequence[int], wanted: Sequence[int]) -> str:
        return (
            f"{self.path}: {name} is {list(wanted)} in this model and {list(found)} in this {self.kind}; "
            "it was made for another model"
        )


def _guess(index: CheckpointIndex) -> tuple[Kind, dict[str, MaskEntry | None]]:
    """Return kind and weights of a file without a JSON."""
    weights = {stem: None for info in index.tensors.values() if (stem := _stem(info))}
    if weights and all(_stem(info) for info in index.tensors.values()):
        return "subspace", dict(weights)
    for info in index.tensors.values():
        if info.dtype == "U8":
            beside = index.path.with_suffix(".json").name
            raise CheckpointError(f"{index.path}: packed bits, whose shapes are in {beside}; put it beside the mask")
        if info.dtype != "BOOL":
            raise CheckpointError(f"{index.path}: not a mask: {info.name} is {info.dtype}, where flags are BOOL")
    return "mask", dict.fromkeys(index.tensors)


def _stem(info: TensorInfo) -> str:
    """Return the weight that a tensor of a subspace belongs to; empty for any other tensor."""
    stem, _, side = info.name.rpartition(".")
    return stem if side in SIDES and info.dtype == "F32" else ""


def _described(
    index: CheckpointIndex, beside: Path, made: Mapping[str, Any]
) -> tuple[Kind, dict[str, MaskEntry | None]]:
    """Return kind and weights as the JSON has them, held against the tensors of the file."""
    kind, rows = made["kind"], made["tensors"]
    if made["file"] != index.path.name:
        raise CheckpointError(f"{beside}: belongs to {made['file']!r}, not to {index.path.name}; rename the two alike")
    if "content_sha256" in made and made["content_sha256"] != index.fingerprint():
        raise CheckpointError(f"{beside}: describes another file than this {index.path.name}; make the mask anew")
    entries = {name: _entry(beside, name, row, kind) for name, row in rows.items()}
    described = {tensor for name in rows for tensor in _tensors(index, name, kind)}
    odd = sorted(described ^ index.tensors.keys())
    if odd:
        raise CheckpointError(f"{index.path}: other tensors than {beside.name} describes, the first {odd[0]!r}")
    for name, found in entries.items():
        _check_layout(index, name, found, kind)
    return kind, dict(entries)


def _tensors(index: CheckpointIndex, name: str, kind: Kind) -> list[str]:
    if kind == "mask":
        return [name]
    return [f"{name}.{side}" for side in SIDES if f"{name}.{side}" in index.tensors] or [f"{name}.U"]


def _entry(beside: Path, name: str, row: Mapping[str, Any], kind: Kind) -> MaskEntry:
    shape = tuple(row["shape"])
    if kind == "subspace":
        return MaskEntry(shape)
    try:
        found = MaskEntry(shape, row["over"], row["packed"], row["kept"])
        if found.kept > found.numel:
            raise ValueError(found.kept)
    except ValueError:
        raise CheckpointError(f"{beside}: what it says about {name!r} makes no sense; make the mask anew") from None
    return found


def _check_layout(index: CheckpointIndex, name: str, found: MaskEntry, kind: Kind) -> None:
    if kind == "mask":
        info, wanted = index.tensors[name], found.spec(name)
        if (info.dtype, info.shape) != (wanted.dtype, wanted.shape):
            raise CheckpointError(
                f"{index.path}: {name} is {info.dtype} {list(info.shape)}, where its JSON makes it "
                f"{wanted.dtype} {list(wanted.shape)}; make the mask anew"
            )
        return
    shapes = [index.tensors[f"{name}.{side}"].shape if f"{name}.{side}" in index.tensors else None for side in SIDES]
    if not spans(shapes, found.shape):
        raise CheckpointError(f"{index.path}: the modes of {name} do not fit a weight of {list(found.shape)}")


def _spans(modes: StoredModes, shape: Shape) -> bool:
    return spans([None if part is None else part.shape for part in modes], shape)


def _spanned(modes: StoredModes) -> list[int]:
    """Return the weight's shape as far as its modes tell; 0 for a side that is missing."""
    return [part.shape[-2] if part is not None and part.ndim > 1 else 0 for part in (modes.u, modes.v)]
