"""Updates of one region of one base tensor: arithmetic in float32, equal to what peft merges.

A region is a Piece of a tensor: all of it, or rows of one expert. Axes: W is [out, in], or [in, out] where it is
*flipped* (embeddings, GPT-2's Conv1D, transposed experts); the factors are A [r, in] and B [out, r] either way.
Fused experts share a pair of factors, A [E*r, in] with experts outermost and B [out, r*E] with experts innermost.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.names.spelling import Piece
from fisherkit.floats import STORED, Floats, Stored, narrow, widen


class Factors:
    """Tensors of an adapter file in float32. Fused experts ask for theirs once per expert, so a few are kept."""

    def __init__(self, reader: ArrayReader) -> None:
        self.reader = reader
        self.small = lru_cache(maxsize=8)(self.values)  # its arrays must not be written to

    def code(self, key: str) -> str:
        """Type that the tensor is stored in, such as ``BF16``."""
        return self.reader.info(key).dtype

    def stored(self, key: str) -> Stored:
        """Read the tensor as it is stored."""
        return self.reader.read(key)

    def values(self, key: str) -> Floats:
        """Read the tensor in float32."""
        return widen(self.stored(key), self.code(key))

    def part(self, key: str, piece: Piece) -> Floats:
        """Read a piece of the tensor in float32, and nothing else of it."""
        info = self.reader.info(key)
        start, count = piece.span(info.shape)
        run = np.empty(count, STORED[info.dtype])
        self.reader.read_into(key, run, start)
        return widen(run, info.dtype).reshape(piece.shape_in(info.shape))


class Update(Protocol):
    """One change to a region of a tensor."""

    @property
    def piece(self) -> Piece:
        """Region that is changed."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Tensors of the adapter file that it uses."""

    def apply(self, weight: Floats, factors: Factors) -> None:
        """Change ``weight``, the whole base tensor, in place."""


def region(weight: Floats, piece: Piece) -> Floats:
    """Return the part of a tensor that a piece is, as a view."""
    return weight if piece.expert is None else weight[piece.expert, piece.start : piece.stop]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """W += scale * B A, and with magnitudes m: W = m * W' / |W'|, norms and magnitudes per output (DoRA).

    Attributes:
        piece: the region W.
        a: key of A.
        b: key of B.
        scale: factor of their product.
        flipped: W is [in, out].
        expert: which of ``experts`` matrices in A and B is meant.
        experts: how many share A and B.
        start: first row of that matrix that W is; 0 and the end where W is all of it.
        stop: row after the last.
        magnitude: key of m.
    """

    piece: Piece
    a: str
    b: str
    scale: float
    flipped: bool
    start: int
    stop: int
    expert: int = 0
    experts: int = 1
    magnitude: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of its factors and magnitudes."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def apply(self, weight: Floats, factors: Factors) -> None:
        """Add the product, and rescale if there are magnitudes."""
        a, b = factors.small(self.a), factors.small(self.b)
        a = a.reshape(self.experts, -1, a.shape[-1])[self.expert]
        b = b.reshape(b.shape[0], -1, self.experts)[:, :, self.expert]
        left, right = (a.T, b.T) if self.flipped else (b, a)
        delta = left[self.start : self.stop] @ right
        delta *= np.float32(self.scale)
        target = region(weight, self.piece)
        target += delta
        if self.magnitude is not None:
            self._rescale(target, factors.small(self.magnitude))

    def _rescale(self, target: Floats, magnitude: Floats) -> None:
        norm = np.linalg.norm(target, axis=0 if self.flipped else 1)
        # An output whose weights are all zero stays zero: no direction, whatever its magnitude.
        factor = np.divide(magnitude, norm, out=np.zeros_like(norm), where=norm > 0)
        target *= factor if self.flipped else factor[:, None]


@dataclass(frozen=True, kw_only=True)
class Whole:
    """W is a tensor of the adapter, or the run of it that corresponds to the region.

    Attributes:
        piece: the region W.
        key: the tensor.
        source: the piece of the tensor that W is.
        copied: the tensor is a by-product of saving, made from the base's own values; those that are the base's,
            rounded to the type of the copy, are taken from the base.
    """

    piece: Piece
    key: str
    source: Piece
    copied: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of its tensor."""
        return (self.key,)

    def apply(self, weight: Floats, factors: Factors) -> None:
        """Put the values in place."""
        target = region(weight, self.piece)
        values, code = factors.part(self.key, self.source), factors.code(self.key)
        if self.copied:
            rounded = widen(narrow(target, code), code)
            values = np.where(rounded == values, target, values)
        target[...] = values


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of W are those of a tensor of the adapter.

    Attributes:
        piece: the region W; always a whole tensor.
        key: the tensor, one row for each index.
        rows: the indices.
    """

    piece: Piece
    key: str
    rows: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of its tensor."""
        return (self.key,)

    def apply(self, weight: Floats, factors: Factors) -> None:
        """Put the rows in place; of an index that occurs twice, the last counts."""
        weight[list(self.rows)] = factors.small(self.key)
