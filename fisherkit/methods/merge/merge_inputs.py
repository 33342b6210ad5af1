"""Masks, subspaces and layer scales of ``merge``, matched with BASE's tensors: what is done to each tensor's delta."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fisherkit.artefacts.layer_importance import layer_scales, read_importance
from fisherkit.artefacts.mask_file import MaskFile, open_mask
from fisherkit.checkpoint.names.axes import AxisFinder
from fisherkit.checkpoint.names.spelling import spelling
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.floats import Floats
from fisherkit.kernels.pull import pull_strengths, pulled_share
from fisherkit.methods.merge.pair_run import Run
from fisherkit.methods.merge.regmean import Filters
from fisherkit.methods.merge.solved import Solver, open_solver
from fisherkit.methods.merge.tensor_selection import Chosen
from fisherkit.options import MergeOptions, Side
from fisherkit.pairs.blend import Treatment

Entries = Mapping[str, tuple[MaskFile, str]]
"""By BASE's tensor names, a file and the tensor's name in it."""


@dataclass(frozen=True)
class MergeInputs:
    """Open files that say what becomes of a delta.

    Attributes:
        masks: of the tensors that a mask speaks of.
        subspaces: of the tensors that a subspace has directions of.
        scales: factors by number of the layer; 1 where there is none.
        axes: which axis of a weight is its input.
        solver: solves for deltas instead; None where none does.
    """

    masks: Entries
    subspaces: Entries
    scales: Mapping[int, float]
    axes: AxisFinder
    solver: Solver | None = None


@contextmanager
def open_inputs(run: Run, options: MergeOptions, filters: Filters | None = None) -> Iterator[MergeInputs]:
    """Open the files that the options name, and refuse those that do not belong to BASE.

    Args:
        run: the pair.
        options: name the files.
        filters: decompositions to share with runs of other strengths; None for none.

    Raises:
        CheckpointError: a file is of another kind or of another model.
        OptionError: a side of which the subspace has no directions.
    """
    index = run.checkpoints.base.index.tensors
    with ExitStack() as stack:
        inputs = MergeInputs(
            masks=_open_entries(stack, run, options.mask, "mask"),
            subspaces=_open_entries(stack, run, options.subspace, "subspace"),
            scales=_layer_scales(run.chosen, options),
            axes=AxisFinder({name: info.shape for name, info in index.items()}),
            solver=open_solver(stack, run, options, filters or Filters()),
        )
        _check_directions(inputs, options)
        yield inputs


def read_treatment(
    inputs: MergeInputs, options: MergeOptions, chosen: Chosen, name: str, shape: tuple[int, ...]
) -> Treatment:
    """Read what is to be done to the delta of one tensor.

    Args:
        inputs: the files.
        options: of the command.
        chosen: gives the layer of the tensor.
        name: the tensor.
        shape: its shape.

    Raises:
        CheckpointError: what a file holds of the tensor does not fit it.
    """
    layer = chosen.places[name].layer
    scale = options.alpha * (1.0 if layer is None else inputs.scales.get(layer, 1.0))
    mask = u = v = None
    if name in inputs.masks:
        file, own = inputs.masks[name]
        mask = file.read(own, shape)
    if name in inputs.subspaces:
        file, own = inputs.subspaces[name]
        modes = file.modes(own, shape)
        side_of_u, side_of_v = _sides_of_axes(inputs.axes, name)
        u = modes.u if options.side in ("both", side_of_u) else None
        v = modes.v if options.side in ("both", side_of_v) else None
        if file.pull is not None and modes.s is not None:
            u, v = (_soften(directions, modes.s, file.pull) for directions in (u, v))
    return Treatment(mask, u, v, scale)


def unmasked(inputs: MergeInputs, options: MergeOptions, chosen: Chosen) -> list[str]:
    """Return the tensors that take part and that the mask does not speak of; none where there is no mask."""
    return [name for name in chosen.names if name not in inputs.masks] if options.mask is not None else []


def _open_entries(stack: ExitStack, run: Run, path: Path | None, kind: str) -> Entries:
    if path is None:
        return {}
    file = stack.enter_context(open_mask(path))
    if file.kind != kind:
        raise CheckpointError(f"{path}: is a {file.kind}; give it as --{file.kind}")
    ours = {spelling(name): name for name in run.checkpoints.base.index.tensors}
    missing = [name for name in file.names if spelling(name) not in ours]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of its {len(file.names)} weights are not in {run.request.base}, such as "
            f"{missing[0]!r}; it was made for another model, or another layout of its experts"
        )
    found = {ours[spelling(name)]: (file, name) for name in file.names}
    # A head and the embedding that both checkpoints tie it to must stay equal: what holds for one holds for the other.
    for pair in run.checkpoints.tuned.tied_pairs.items():
        for one, other in (pair, pair[::-1]):
            if one in found:
                found.setdefault(other, found[one])
    return found


def _layer_scales(chosen: Chosen, options: MergeOptions) -> Mapping[int, float]:
    if options.layer_scale is None:
        return {}
    scales = layer_scales(read_importance(options.layer_scale), power=options.power, floor=options.floor)
    layers = {place.layer for place in chosen.places.values() if place.layer is not None}
    if scales.keys() != layers:
        raise CheckpointError(
            f"{options.layer_scale}: is about {len(scales)} layers, and BASE has {len(layers)}; measure the Fisher of "
            "this model"
        )
    return scales


def _check_directions(inputs: MergeInputs, options: MergeOptions) -> None:
    """Refuse a side of which the subspace has no directions, before anything is written."""
    for name, (file, own) in inputs.subspaces.items():
        known = zip(_sides_of_axes(inputs.axes, name), file.has_sides(own), strict=True)
        if not any(held and options.side in ("both", side) for side, held in known):
            raise OptionError(f"--side {options.side}: {file.path} has no directions of that side for {own!r}")


def _sides_of_axes(finder: AxisFinder, name: str) -> tuple[Side, Side]:
    """Return what U and V are directions of: outputs and inputs; the other way round for a Conv1D [in, out]."""
    axes = finder.axes(name)
    return ("left", "right") if axes is None or axes.output < axes.input else ("right", "left")


def _soften(directions: Floats | None, spectrum: Floats, pull: float) -> Floats | None:
    """Directions q_j times the root of the share p_j that is taken: what is removed is then sum_j p_j (D q_j) q_j^T."""
    if directions is None:
        return None
    share = pulled_share(pull_strengths(pull, spectrum, directions.shape[-2]))
    return directions * np.sqrt(share)[..., None, :]
