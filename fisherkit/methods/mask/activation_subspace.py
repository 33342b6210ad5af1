"""A subspace of what passes through the layers: updates then do nothing to what a model reads, or writes, most.

- ``activation``: the leading eigenvectors of E[x x^T], x what goes into a layer (GPM, arXiv 2103.09762). An update
  without them maps every protected input to zero: it has no effect on it.
- ``kron``: these, and for the other side the leading eigenvectors of E[g g^T], g the gradient at the layer's output.

What ``extract --statistics activations`` gathered is read; weights that share an input share its directions. U and V
are of the axes as stored, so those of a Conv1D's inputs [in, out] are U. S are the eigenvalues where one side is
stored; ``kron`` has two spectra and stores none. The side with fewer directions is filled up with columns of zeros.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherkit.artefacts.covariance_file import CovarianceFile, Which, path_beside
from fisherkit.engine.model.device import choose_device
from fisherkit.errors import CheckpointError, OptionError, some_names
from fisherkit.kernels.eigenspace import (
    Directions,
    directions_for_energy,
    factor_directions,
    fewest,
    top_directions,
)
from fisherkit.methods.mask.binary import Masked
from fisherkit.methods.mask.scores import MaskInputs
from fisherkit.methods.mask.subspace import ArraySpool, as_written
from fisherkit.options import MaskOptions
from fisherkit.progress import Track

_SIDES: dict[str, tuple[Which, ...]] = {"right": ("input",), "left": ("output",), "both": ("input", "output")}


def write_activation_subspace(
    out: Path, made_from: MaskInputs, options: MaskOptions, work: Path, track: Track
) -> Masked:
    """Find the directions of every matrix that has covariances, and write them.

    Args:
        out: the subspace to make.
        made_from: the Fisher.
        options: see MaskOptions.
        work: work folder, in which it is made.
        track: progress in weights.

    Raises:
        CheckpointError: no covariances beside the Fisher, or another model's.
        OptionError: a rank that no covariance has, or no such device.
        OutputError: the disk is full.
    """
    path = options.activations or path_beside(made_from.path)
    with CovarianceFile(path) as file:
        file.check_model(made_from.provenance, list(made_from.shapes))
        finder = CovarianceDirections(file, made_from, options)
        names = [name for name in made_from.shapes if finder.has(name)]
        finder.prepare(names)
        spool = ArraySpool(work / "directions")
        details: dict[str, dict[str, Any]] = {}
        for done, name in enumerate(names, start=1):
            found = finder.directions(name)
            if all(len(one.values) for one in found.values()):
                for part, values in _parts(found, made_from, name).items():
                    spool.add(f"{name}.{part}", values)
                details[name] = _figures(found)
            track("finding directions", done, len(names))
    if not details:
        raise CheckpointError(f"{path}: every covariance is zero throughout: there is nothing to protect")
    unreached = tuple(name for name in names if name not in details)
    notes = _notes(made_from, names, details, options)
    return as_written(spool.written(out, work), made_from, details, unreached, notes)


class CovarianceDirections:
    """Directions of weights, found once for all weights that share a covariance."""

    def __init__(self, file: CovarianceFile, made_from: MaskInputs, options: MaskOptions) -> None:
        self._file, self._inputs, self._options = file, made_from, options
        self._sides = _SIDES[options.stored_side]
        self._device = choose_device(options.device, float64=True)
        self._uses: Counter[str] = Counter()
        self._found: dict[str, Directions] = {}

    def has(self, name: str) -> bool:
        """Return whether a weight has all the covariances that are needed."""
        is_matrix = len(self._inputs.shapes[name]) == 2 and self._inputs.axes.axes(name) is not None
        return is_matrix and all(self._file.covariance_of(name, side) for side in self._sides)

    def prepare(self, names: list[str]) -> None:
        """Compare the weights with their covariances, and count how many share each.

        Raises:
            CheckpointError: sizes that do not fit.
            OptionError: the rank is above every size.
        """
        for name in names:
            axes = self._inputs.axes.axes(name)
            for side in self._sides:
                covariance = self._covariance_of(name, side)
                self._uses[covariance] += 1
                assert axes is not None
                wanted = self._inputs.shapes[name][axes.input if side == "input" else axes.output]
                if self._file.size(covariance) != wanted:
                    raise CheckpointError(
                        f"{self._file.path}: {covariance} has {self._file.size(covariance)} channels, and the "
                        f"{side}s of {name} are {wanted}; it is of another model"
                    )
        most = max((self._file.size(covariance) for covariance in self._uses), default=0)
        if self._options.svd_rank is not None and self._options.svd_rank > most:
            raise OptionError(
                f"--svd-rank {self._options.svd_rank} is above the size of every covariance; at most {most}"
            )

    def directions(self, name: str) -> dict[Which, Directions]:
        """Return the directions of a weight, by what they are directions of."""
        return {side: self._directions(self._covariance_of(name, side)) for side in self._sides}

    def _covariance_of(self, name: str, side: Which) -> str:
        covariance = self._file.covariance_of(name, side)
        assert covariance is not None
        return covariance

    def _directions(self, covariance: str) -> Directions:
        if covariance not in self._found:
            self._found[covariance] = self._find(covariance)
        self._uses[covariance] -= 1
        return self._found[covariance] if self._uses[covariance] else self._found.pop(covariance)

    def _find(self, covariance: str) -> Directions:
        rank, energy = self._options.svd_rank, self._options.svd_energy
        read = self._file.read(covariance)
        values = torch.from_numpy(read.values).to(self._device)
        if read.is_factor:
            every = factor_directions(values, read.trace)
            found = every.first(rank) if rank is not None else fewest(every, energy or 1) or every
        else:
            found = top_directions(values, rank) if rank is not None else directions_for_energy(values, energy or 1)
        return Directions(found.vectors.cpu(), found.values.cpu(), found.trace)


def _parts(found: dict[Which, Directions], made_from: MaskInputs, name: str) -> dict[str, Any]:
    """Arrays that are stored of a weight, by the ending of their names."""
    axes = made_from.axes.axes(name)
    assert axes is not None
    rank = max(len(one.values) for one in found.values())
    parts = {}
    for side, one in found.items():
        axis = axes.input if side == "input" else axes.output
        filled = torch.nn.functional.pad(one.vectors, (0, rank - one.vectors.shape[1]))
        parts["UV"[axis]] = np.ascontiguousarray(filled.numpy())
        if len(found) == 1:
            parts["S"] = np.ascontiguousarray(one.values.numpy())
    return {ending: parts[ending] for ending in "USV" if ending in parts}


def _figures(found: dict[Which, Directions]) -> dict[str, Any]:
    """Figures of a weight for the JSON: means over the sides, and each side where there are two."""
    sides = {
        side: {"rank": len(one.values), "energy": one.energy, "effective_rank": one.effective_rank}
        for side, one in found.items()
    }
    rows = list(sides.values())
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("energy", "effective_rank")}
    return {"rank": max(row["rank"] for row in rows), **means} | ({"sides": sides} if len(sides) > 1 else {})


def _notes(
    made_from: MaskInputs, names: list[str], details: dict[str, dict[str, Any]], options: MaskOptions
) -> tuple[str, ...]:
    found = []
    if zero := [name for name in names if name not in details]:
        found.append(f"nothing ever passed through them, so without directions to protect: {some_names(zero)}")
    without = [name for name, shape in made_from.shapes.items() if len(shape) > 1 and name not in names]
    if without:
        found.append(f"left out, having no covariances (no linear layers): {some_names(without)}")
    if options.svd_energy is not None and options.svd_energy < 1:
        short = [name for name, row in details.items() if row["energy"] < options.svd_energy * (1 - 1e-4)]
        if short:
            found.append(
                f"the sketch of their covariance holds less than --svd-energy {options.svd_energy}: {some_names(short)}"
            )
    if full := [name for name in details if details[name]["rank"] >= max(made_from.shapes[name])]:
        found.append(f"all of their directions are protected, so they cannot change: {some_names(full)}")
    return tuple(found)
