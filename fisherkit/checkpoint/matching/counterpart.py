"""Weights of one file under the names of another: a checkpoint or a second Fisher beside a Fisher.

Prefixes, shards and dtypes may differ, and experts may be fused on one side only. Values come as float32, in blocks,
so that nothing is ever in memory as a whole. numpy; knows no methods.
"""

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.checkpoint.matching.links import Link, Segment, links
from fisherkit.checkpoint.matching.view import Side
from fisherkit.errors import CheckpointError, some_names
from fisherkit.floats import FLOATING, STORED, Floats, widen


class Values:
    """Reads float32 values of the weights of a file by their names there; close it, or use it as a context.

    Args:
        index: of the file.
        kind: what it is; of a ``Fisher``, negative values are refused as well.
    """

    def __init__(self, index: CheckpointIndex, kind: str = "checkpoint") -> None:
        self.path = index.path
        self._least = 0.0 if kind == "Fisher" else -math.inf
        self._reader = ArrayReader(index)
        for info in index.tensors.values():
            if info.dtype not in FLOATING and kind == "Fisher":
                raise CheckpointError(f"{index.path}: not a Fisher: {info.name} is {info.dtype}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, at)

    def block(self, name: str, start: int, stop: int) -> Floats:
        """Read entries ``start`` to ``stop`` of the flat weight, in float32.

        Raises:
            CheckpointError: the file is cut short, or holds a value there that is NaN, infinite, or wrongly negative.
        """
        values = np.empty(stop - start, np.float32)
        for source, source_start, part in self._runs(name, start, stop, values):
            self._fill(source, source_start, part)
        return self._checked(name, start, values)

    def _runs(self, name: str, start: int, stop: int, out: Floats) -> Sequence[tuple[str, int, Floats]]:
        return [(name, start, out)]

    def _fill(self, source: str, start: int, out: Floats) -> None:
        code = self._reader.info(source).dtype
        stored = np.empty(out.size, STORED[code])
        self._reader.read_into(source, stored, start)
        widen(stored, code, out)

    def _checked(self, name: str, start: int, values: Floats) -> Floats:
        if not values.size or (values.min() >= self._least and np.isfinite([values.min(), values.max()]).all()):
            return values  # NaN goes through minimum and maximum
        bad = np.flatnonzero(~np.isfinite(values))
        what = "NaN or infinities" if bad.size else "negative values, which no Fisher has"
        first = start + int(bad[0] if bad.size else np.flatnonzero(values < self._least)[0])
        raise CheckpointError(f"{self.path}: {name} holds {what}, the first at index {first}; make it anew")


class Counterpart(Values):
    """Reads float32 values of the weights of a file by their names in another."""

    def __init__(
        self, index: CheckpointIndex, segments: Mapping[str, Sequence[Segment]], kind: str = "checkpoint"
    ) -> None:
        super().__init__(index, kind)
        self._segments = segments

    @classmethod
    def of(cls, ours: CheckpointIndex, theirs: CheckpointIndex, kind: str = "checkpoint") -> Self:
        """Match every weight of ``ours`` with what ``theirs`` has for it.

        Args:
            ours: gives names and shapes.
            theirs: another file of the same model.
            kind: of ``theirs``: a ``checkpoint``, or a ``Fisher``.

        Raises:
            CheckpointError: it is of another model, quantised, or lacks some of the weights.
        """
        here = Side(ours, {})
        there = Side(theirs, {}) if kind == "Fisher" else Side.of(theirs, theirs.path)
        found = links(here, there)
        absent = [name for name in here.weights if name not in found]
        if absent:
            raise CheckpointError(
                f"{theirs.path}: has nothing for {len(absent):,} tensor{'s' if len(absent) > 1 else ''} "
                f"({some_names(absent)}) of {ours.path}; the two must be of one model"
            )
        for name, parts in found.items():
            for link in parts:
                _check_shape(name, link, here, there)
        segments = {
            name: [_segment(here.weights[name], there, link) for link in parts] for name, parts in found.items()
        }
        return cls(theirs, segments, kind)

    def _runs(self, name: str, start: int, stop: int, out: Floats) -> Sequence[tuple[str, int, Floats]]:
        runs = []
        for segment in self._segments[name]:
            first, last = max(start, segment.start), min(stop, segment.start + segment.size)
            if first < last:
                part = out[first - start : last - start]
                runs.append((segment.source, segment.source_start + first - segment.start, part))
        return runs


def _segment(shape: tuple[int, ...], there: Side, link: Link) -> Segment:
    start, size = link.ours.span(shape)
    return Segment(start, link.source, link.theirs.span(there.weights[link.source])[0], size)


def _check_shape(name: str, link: Link, here: Side, there: Side) -> None:
    ours, theirs = link.ours.shape_in(here.weights[name]), link.theirs.shape_in(there.weights[link.source])
    if ours != theirs:
        raise CheckpointError(
            f"{name} is {list(ours)} in {here.index.path} and {list(theirs)} in {there.index.path}; "
            "the two must be of one model"
        )
