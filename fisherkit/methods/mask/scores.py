"""Inputs of a mask: a Fisher, and beside it the weights or a second Fisher, as scores by block.

Names and shapes are the Fisher's, in the order of the model, so that ties fall alike whatever kind of file it is in.
Nothing is read before it is asked for, and a block at a time then.
"""

import functools
import hashlib
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fisherkit.artefacts.statistics import provenance_of
from fisherkit.checkpoint.folder.side_files import architectures, read_config
from fisherkit.checkpoint.hub import resolve_model
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.matching.counterpart import Counterpart, Values
from fisherkit.checkpoint.names.axes import AxisFinder
from fisherkit.checkpoint.names.location import Location, block_prefix, locate
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.floats import Floats
from fisherkit.kernels.mask_scores import Doubles, Flags, Units, contrasted, entry_scores
from fisherkit.kernels.prune_scores import BLOCK, drawing
from fisherkit.options import MaskOptions
from fisherkit.pairs.parallel import BlockPool
from fisherkit.pairs.ranking import Block, entry_vector, unit_scores


class MaskInputs:
    """Open files that a mask is made from; a context.

    Attributes:
        path: the Fisher's.
        shapes: of its tensors, in model order.
        places: where each sits in its model.
        provenance: what extract wrote beside the Fisher; None where nothing is known.
        axes: which axis of a weight is its input.
        fisher: the Fisher's values.
        weights: the checkpoint's, where they are needed.
        delta: the fine-tune's, where they are needed.
        other: the second Fisher's, where one is given.
    """

    def __init__(self, fisher: Path, options: MaskOptions) -> None:
        if fisher.suffix == ".json" and not fisher.name.endswith(".index.json"):
            raise OptionError(f"{fisher}: a mask is made from the tensors; name the Fisher, not a .json")
        index = open_index(fisher)
        self.path = fisher
        blocks = block_prefix(index.tensors)
        places = {name: locate(name, blocks) for name in index.tensors}
        order = sorted(index.tensors, key=lambda name: _rank(name, places[name]))
        self.shapes = {name: index.tensors[name].shape for name in order}
        self.places = places
        self.provenance: Mapping[str, Any] | None = provenance_of(fisher)
        self._stack = ExitStack()
        self.weights: Values | None = None
        self.delta: Values | None = None
        self.other: Values | None = None
        architecture = str((self.provenance or {}).get("model", {}).get("architecture") or "")
        with ExitStack() as stack:
            self.fisher = stack.enter_context(Values(index, "Fisher"))
            if options.weights is not None:
                source = resolve_model(str(options.weights))
                self.weights = stack.enter_context(Counterpart.of(index, open_index(source.path)))
                architecture = architecture or next(iter(architectures(read_config(source.path))), "")
            if options.delta is not None:
                self.delta = stack.enter_context(
                    Counterpart.of(index, open_index(resolve_model(str(options.delta)).path))
                )
            if options.against is not None:
                self.other = stack.enter_context(Counterpart.of(index, open_index(options.against), "Fisher"))
            self._stack = stack.pop_all()
        self.axes = AxisFinder(self.shapes, architecture)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def size(self, name: str) -> int:
        """Return the number of entries of a weight."""
        return math.prod(self.shapes[name])

    def experts(self, name: str) -> int:
        """Return how many experts are fused in a weight; 1 for any other."""
        shape = self.shapes[name]
        return shape[0] if len(shape) == 3 and self.axes.axes(name) is not None else 1


class Scorer:
    """Scores of entries and units, and which experts any gradient reached."""

    def __init__(self, made_from: MaskInputs, options: MaskOptions, combine: str, pool: BlockPool) -> None:
        self._inputs = made_from
        self._options = options
        self._combine = combine
        self._pool = pool
        self._reached: dict[str, Flags] = {}
        self._means = (1.0, 1.0)

    def prepare(self) -> None:
        """Take the means of two Fishers; without a second one there is nothing to do.

        Raises:
            CheckpointError: values that no Fisher has, or nothing but zeros.
        """
        if self._inputs.other is not None:
            self._means = self._mean(self._inputs.fisher), self._mean(self._inputs.other)

    def block(self, name: str) -> Block:
        """Return a function that gives the scores of the entries of a weight."""
        if self._options.score == "random":
            return lambda start, stop: self._drawn(name, start, stop)
        if self._inputs.other is None:
            return lambda start, stop: self._entries(name, start, stop)
        return lambda start, stop: self._contrasted_entries(name, start, stop)

    def vector(self, name: str, units: Units) -> Doubles:
        """Return the scores of the units of a weight; two Fishers are contrasted after each was combined."""
        if self._options.score == "random":
            parts = self._pool.map(lambda a, b: self._drawn(name, a, b), units.count)
            return np.concatenate(parts).astype(np.float64)
        found = self._combined(units, lambda start, stop: self._entries(name, start, stop))
        other = self._inputs.other
        if other is None:
            return found
        against = self._combined(units, lambda start, stop: other.block(name, start, stop))
        return self._contrast(found, against)

    @property
    def unreached(self) -> tuple[str, ...]:
        """Weights, or experts of fused weights (``name[3]``), whose Fisher is zero throughout, of those scored."""
        found = []
        for name, flags in self._reached.items():
            if len(flags) == 1 or not flags.any():
                found += [name] if not flags.any() else []
            else:
                found += [f"{name}[{expert}]" for expert in np.flatnonzero(~flags)]
        return tuple(found)

    def check_reached(self) -> None:
        """Raise CheckpointError if the Fisher was looked at and every entry was zero."""
        if self._reached and not any(flags.any() for flags in self._reached.values()):
            raise CheckpointError(_all_zero(self._inputs.path))

    def _combined(self, units: Units, block: Block) -> Doubles:
        if units.over is None:
            return entry_vector(units, block, self._pool)
        return unit_scores(units, self._combine, block, self._pool)

    def _entries(self, name: str, start: int, stop: int) -> Floats:
        score, weights = self._options.score, self._inputs.weights
        f = None if score == "magnitude" else self._fisher(name, start, stop)
        return entry_scores(score, f, None if weights is None else weights.block(name, start, stop))

    def _fisher(self, name: str, start: int, stop: int) -> Floats:
        values = self._inputs.fisher.block(name, start, stop)
        known = self._reached.setdefault(name, np.zeros(self._inputs.experts(name), np.bool_))
        size = self._inputs.size(name) // len(known) if len(known) else 0
        for expert in range(start // size, -(-stop // size)) if size else ():
            if values[max(0, expert * size - start) : (expert + 1) * size - start].any():
                known[expert] = True
        return values

    def _contrasted_entries(self, name: str, start: int, stop: int) -> Floats:
        assert self._inputs.other is not None
        g = self._inputs.other.block(name, start, stop).astype(np.float64)
        return self._contrast(self._entries(name, start, stop).astype(np.float64), g).astype(np.float32)

    def _contrast(self, f: Doubles, g: Doubles) -> Doubles:
        return contrasted(self._options.contrast or "ratio", f / self._means[0], g / self._means[1])

    def _drawn(self, name: str, start: int, stop: int) -> Floats:
        """Uniform numbers by the weight's name, so that other weights in the file make no difference."""
        out = np.empty(stop - start, np.float32)
        stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
        drawing(self._options.seed, stream, start // BLOCK)(out)
        return out

    def _mean(self, values: Values) -> float:
        total, count = 0.0, 0
        for name in self._inputs.shapes:
            size = self._inputs.size(name)
            sums = self._pool.map(functools.partial(_block_sum, values, name), size)
            total, count = total + math.fsum(sums), count + size
        if not total:
            raise CheckpointError(_all_zero(values.path))
        return total / count


def _block_sum(values: Values, name: str, start: int, stop: int) -> float:
    return float(values.block(name, start, stop).sum(dtype=np.float64))


def _all_zero(path: Path) -> str:
    return (
        f"{path}: every entry is zero, so there is nothing to rank; no gradient reached the weights it was measured on"
    )


def _rank(name: str, place: Location) -> tuple[bool, int, str]:
    """Blocks by number, then what lies outside of them; by name within."""
    return place.layer is None, place.layer or 0, name
