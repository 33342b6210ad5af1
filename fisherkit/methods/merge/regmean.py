"""merge --regmean: deltas solved for with the covariances of old and new inputs; the formula is in kernels.regmean.

OLD and NEW are files of covariances that ``extract`` wrote: of BASE on prompts of old abilities, and of FT (or BASE) on
those of the new task. Weights that share their inputs share a decomposition.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fisherkit.artefacts.covariance_file import CovarianceFile, find_covariances
from fisherkit.checkpoint.names.axes import AxisFinder
from fisherkit.checkpoint.names.spelling import spelling
from fisherkit.errors import CheckpointError
from fisherkit.kernels.moment import Doubles, Moment
from fisherkit.kernels.regmean import Filter, best_factors, decompose
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair
from fisherkit.methods.merge.fine_tunes import FineTunes, refuse_swapped
from fisherkit.methods.merge.pair_run import Run
from fisherkit.options import MergeOptions
from fisherkit.pairs.rewrite import TensorRow
from fisherkit.pairs.solve import change_rows

Key = tuple[str | None, ...]
"""Names of a weight's covariances: in OLD (None where there is no OLD), and in each of NEW."""
_DAMPING = 1e-3
_FILTER_BYTES = 1 << 30  # of decompositions that are kept, the last ones: a layer of an 8B model
_GAINS = 10  # figures of a weight's filter that are reported


class RegMean:
    """Solver for the weights that all files have a covariance of.

    Args:
        stack: closes the files.
        run: BASE and FT.
        options: name the files.
        tunes: further fine-tunes.
        filters: decompositions, which runs of other strengths may share.

    Attributes:
        keep_factors: takes the factors B and A of every solved delta, where an adapter is made of them.

    Raises:
        CheckpointError: a file cannot be read, is of another model, or they have no weight in common.
    """

    def __init__(self, stack: ExitStack, run: Run, options: MergeOptions, tunes: FineTunes, filters: "Filters") -> None:
        assert options.regmean is not None
        old, new = options.regmean
        self._options, self._tunes = options, tunes
        index = run.checkpoints.base.index.tensors
        self._shapes = {name: info.shape for name, info in index.items()}
        self._inputs = _input_axes(self._shapes)
        channels = {name: self._shapes[name][axis] for name, axis in self._inputs.items()}
        base, tuned = run.checkpoints.base.index.fingerprint(), run.checkpoints.tuned.fingerprint()
        measured = [[base, tuned], *([base, other] for other in tunes.fingerprints)]
        files = [_open(stack, path) for path in (new, *(path for _, path in options.also))]
        self._news = [_Matched(file, models, channels, options) for file, models in zip(files, measured, strict=True)]
        self._old = _Matched(_open(stack, old), measured[0], channels, options) if old is not None else None
        if self._old is not None and not options.force_model:
            refuse_swapped(self._old.file.measured_on, self._news[0].file.measured_on, base, tuned, self._old.file.path)
        self._keys = self._match(run.chosen.names)
        self._filters = filters
        self._files = tuple(map(str, (old, new, *(one for _, one in options.also))))
        self.keep_factors: Callable[[str, Doubles, Doubles], None] | None = None

    @cached_property
    def covered(self) -> frozenset[str]:
        """BASE's tensors that are solved for."""
        return frozenset(self._keys)

    def change(self, pair: TensorPair, name: str) -> tuple[DeltaCounts, TensorRow]:
        """Overwrite the base's matrix with the solved one; returns counts and what its row says of the solve.

        Args:
            pair: the matrix of BASE and FT, flat.
            name: one of ``covered``.
        """
        solver, weight = self._filter(self._keys[name]), self._options.old_weight
        energies, squares, weighed = np.zeros(len(solver.spectrum)), 0.0, []

        def solve(deltas: list[Doubles], rows: slice) -> Doubles:
            nonlocal energies, squares
            solved = solver.solve(deltas, weight)
            energies, squares = energies + solved.energies, squares + float(np.square(solved.delta).sum())
            if self.keep_factors is not None:
                weighed.append(solver.weighed(deltas, weight))
            return solved.delta

        others, (height, width) = self._tunes.load(name, pair.base), self._shapes[name]
        counts = change_rows(
            pair,
            others,
            (height, width),
            input_axis=self._inputs[name],
            scale=self._options.alpha,
            change=solve,
        )
        figures = self._figures(solver, energies, squares, self._keys[name])
        if self.keep_factors is not None and self._options.lora_rank is not None:
            b, a, held = best_factors(np.concatenate(weighed), self._options.lora_rank)
            self.keep_factors(name, self._options.alpha * b, solver.unweighed(a, weight))
            figures["lora_held"] = held
        return counts, {"regmean": figures}

    def input_axis(self, name: str) -> int:
        """Return the axis that the inputs of a matrix run along."""
        return self._inputs[name]

    def _match(self, names: Sequence[str]) -> dict[str, Key]:
        files = [*([self._old] if self._old is not None else []), *self._news]
        none: Key = () if self._old is not None else (None,)
        found = {
            name: none + tuple(file.of[name] for file in files)
            for name in names
            if all(name in file.of for file in files)
        }
        if not found:
            shown = " and ".join(str(file.file.path) for file in files)
            raise CheckpointError(f"{shown}: have covariances of no weight in common that takes part")
        return found

    def _filter(self, key: Key) -> Filter:
        damping = self._options.damping if self._options.damping is not None else _DAMPING
        return self._filters.get(
            (self._files, self._options.tune_weights, damping, key), lambda: self._decompose(key, damping)
        )

    def _decompose(self, key: Key, damping: float) -> Filter:
        old = self._old.moment(key[0]) if self._old is not None else None
        moments = [file.moment(name) for file, name in zip(self._news, key[1:], strict=True)]
        news = list(zip(self._options.tune_weights, moments, strict=True))
        try:
            return decompose(news, old, damping)
        except CheckpointError as error:
            raise CheckpointError(f"{self._news[0].file.path}: {key[1]}: {error}") from None

    def _figures(self, solver: Filter, energies: Doubles, squares: float, key: Key) -> dict[str, Any]:
        """Figures of a weight's solve; energies are mean squares of what the delta adds to the layer's outputs."""
        gains, spectrum = solver.gains(self._options.old_weight), solver.spectrum
        new, old = float(energies.sum()), float(spectrum @ energies)
        new_left, old_left = float(np.square(gains) @ energies), float((spectrum * np.square(gains)) @ energies)
        files = [self._old, *self._news] if self._old is not None else [None, *self._news]
        rests = [file.left_out(name) for file, name in zip(files, key, strict=True) if file is not None]
        return {
            "old_weight": self._options.old_weight,
            "damping": list(solver.damping),
            "damping_share": min(1.0, sum(solver.damping) * squares / new_left) if new_left else 0.0,
            "new_energy": new,
            "new_kept": new_left / new if new else 1.0,
            "old_energy": old,
            "old_kept": old_left / old if old else 1.0,
            "left_out_by_factors": max(rests),
            "gains": _quantiles(gains, energies),
        }


class Filters:
    """Decompositions that were made last, as many as fit a number of bytes; at least one."""

    def __init__(self) -> None:
        self._held: OrderedDict[object, Filter] = OrderedDict()

    def get(self, key: object, make: Callable[[], Filter]) -> Filter:
        """Return a decomposition by its key, made where it is not held."""
        if key not in self._held:
            made = make()
            while self._held and sum(one.nbytes for one in (made, *self._held.values())) > _FILTER_BYTES:
                self._held.popitem(last=False)
            self._held[key] = made
        self._held.move_to_end(key)
        return self._held[key]


class _Matched:
    """A file of covariances, by BASE's names.

    Args:
        file: the file.
        models: fingerprints of the models that it may have been measured on.
        channels: inputs of each of BASE's matrices.
        options: may force a model.
    """

    def __init__(
        self, file: CovarianceFile, models: Sequence[str], channels: Mapping[str, int], options: MergeOptions
    ) -> None:
        self.file = file
        if file.measured_on not in (None, *models) and not options.force_model:
            raise CheckpointError(
                f"{file.path}: was measured on another model than BASE and its fine-tune; extract it from one of them, "
                "or --force-model for a close relative"
            )
        theirs = {spelling(name): name for name in file.weights("input")}
        self.of: dict[str, str] = {}
        for name, size in channels.items():
            covariance = file.covariance_of(theirs.get(spelling(name), ""), "input")
            if covariance is None:
                continue
            if file.size(covariance) != size:
                raise CheckpointError(
                    f"{file.path}: {covariance} has {file.size(covariance)} channels, and {name} has {size} inputs; "
                    "it is of another model"
                )
            self.of[name] = covariance

    def moment(self, covariance: str | None) -> Moment:
        assert covariance is not None
        read = self.file.read(covariance)
        return Moment.of(read.values, is_factor=read.is_factor, trace=read.trace)

    def left_out(self, covariance: str | None) -> float:
        assert covariance is not None
        return 1.0 - self.file.energy(covariance)


def _open(stack: ExitStack, path: Path) -> CovarianceFile:
    return stack.enter_context(CovarianceFile(find_covariances(path)))


def _input_axes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the axis that the inputs run along, for every matrix."""
    finder = AxisFinder(shapes)
    found = {name: finder.axes(name) for name, shape in shapes.items() if len(shape) == 2}
    return {name: axes.input for name, axes in found.items() if axes is not None}


def _quantiles(gains: Doubles, energies: Doubles) -> list[float]:
    """Return the gains at the middles of equal parts of the delta's energy, the largest first."""
    order = np.argsort(-gains, kind="stable")
    held = np.cumsum(energies[order])
    if not held[-1]:
        return []
    places = np.searchsorted(held, held[-1] * (np.arange(_GAINS) + 0.5) / _GAINS)
    return [float(gains[order[min(place, len(order) - 1)]]) for place in places]
