"""Reads what a caller gives as a mask, in any of its forms, into one: a Constraint.

A path of a mask, a subspace or a ``layer_importance.json``; an open ``MaskFile``; a mapping of bool tensors, of modes
(``<name>.U``, ``<name>.V``), or what is in a ``layer_importance.json``. Knows no model.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fisherkit.artefacts.layer_importance import FLOOR, POWER, layer_scales, read_importance
from fisherkit.artefacts.mask_entry import fit_shape, spans
from fisherkit.artefacts.mask_file import SIDES, MaskFile, open_mask
from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.headers import parse_json
from fisherkit.checkpoint.hub import resolve_model
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.names.spelling import spelling
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.floats import widen
from fisherkit.kernels.pull import pull_strengths
from fisherkit.options import check_pull, check_steps

Shape = tuple[int, ...]
MaskLike = str | Path | MaskFile | Mapping[str, Any] | Sequence[float]


class Basis(NamedTuple):
    """Orthonormal columns that span the protected directions of a weight [..., a, b]: u [..., a, k], v [..., b, k]."""

    u: Tensor | None
    v: Tensor | None


class Pull(NamedTuple):
    """Directions q [n, k] (orthonormal columns) that each step draws back by strengths [k], see kernels.pull.

    ``axis`` of the weight [a, b] is the one that they are of: 0 (n = a) or 1 (n = b).
    """

    directions: Tensor
    strengths: Tensor
    axis: int


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """Mask, subspace or layer scales that a run is asked to obey.

    Attributes:
        kind: ``mask`` (binary), ``subspace``, or ``scale`` (one factor per layer).
        label: what to call it in a message.
        names: the weights it speaks of, by checkpoint name; empty for ``scale``.
        flags: for a mask, name and shape of the weight -> bool tensor, broadcastable to it; True = may change.
        basis: for a subspace, name and shape of the weight -> its protected directions, float32.
        pull: for a soft subspace, name and shape of the weight -> what is drawn back, float32; None for a hard one.
        anchor: for a soft subspace, name and shape of the weight -> what it is drawn back to, float32; None for the
            weight that is there when the rules are made.
        scales: for ``scale``, the factor of every layer.
    """

    kind: Literal["mask", "subspace", "scale"]
    label: str
    names: tuple[str, ...] = ()
    flags: Callable[[str, Shape], Tensor] | None = None
    basis: Callable[[str, Shape], Basis] | None = None
    pull: Callable[[str, Shape], Pull] | None = None
    anchor: Callable[[str, Shape], Tensor] | None = None
    scales: Mapping[int, float] = field(default_factory=dict)


class LazyMasks(Mapping[str, Tensor]):
    """Masks of a file by checkpoint name, read when asked for; bool, broadcastable to the weight.

    Flags of a file without a description (see ``artefacts.mask_file``) come in the shape they have there.
    """

    def __init__(self, file: MaskFile) -> None:
        self.file = file

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.file.names:
            raise KeyError(name)
        return torch.from_numpy(self.file.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.names)

    def __len__(self) -> int:
        return len(self.file.names)


def load_mask(path: str | Path) -> LazyMasks:
    """Open a mask file as a mapping from checkpoint names to bool tensors; True = may change.

    Each is broadcastable to its weight: [out, 1] for a mask of rows, [1, in] of columns, the weight's shape otherwise.

    Raises:
        CheckpointError: no mask, damaged, or a subspace.
    """
    file = open_mask(path)
    if file.kind != "mask":
        raise CheckpointError(f"{path}: is a {file.kind}, not a mask; give its path to MaskedUpdate or constrain")
    return LazyMasks(file)


def read_constraint(
    mask: MaskLike,
    *,
    power: float = POWER,
    floor: float = FLOOR,
    pull: float | None = None,
    anchor: str | Path | None = None,
    steps: float | None = None,
) -> Constraint:
    """Bring what a caller gave to one form; files are opened, their tensors not read.

    Args:
        mask: see the module.
        power: of layer scales, see ``artefacts.layer_importance``.
        floor: of layer scales.
        pull: of a subspace with a spectrum, in place of what its file says.
        anchor: the checkpoint that a soft subspace draws back to.
        steps: the length of the course in steps at its peak rate, over which a pull is spread.

    Raises:
        CheckpointError: a file that is none of these or damaged, or a mapping of something else.
        OptionError: power, floor, pull or steps outside their range, a pull or anchor for what is no soft subspace, or
            no steps for one.
    """
    file = _opened(mask)
    if pull is not None:
        check_pull(pull)
    strength = file.pull if file is not None and pull is None else pull
    if (pull or anchor) and (file is None or file.kind != "subspace" or strength is None):
        what = "anchor" if pull is None else "pull"
        raise OptionError(f"{what} is for a soft subspace, as `fisherkit mask --preset shield` writes it; this is none")
    check_steps(steps)
    if file is not None:
        return _from_file(file, strength, anchor, steps)
    assert not isinstance(mask, MaskFile)
    if isinstance(mask, Mapping) and any(isinstance(value, Tensor) for value in mask.values()):
        return _from_tensors(mask)
    label = str(mask) if isinstance(mask, str | Path) else "the layer importance"
    scales = layer_scales(read_importance(mask), power=power, floor=floor)
    return Constraint(kind="scale", label=label, scales=scales)


def _opened(mask: MaskLike) -> MaskFile | None:
    """Return the file behind a mask; None where there is none, or one of layer importance."""
    if isinstance(mask, LazyMasks):
        return mask.file
    if isinstance(mask, str | Path) and Path(mask).suffix != ".json":
        return open_mask(mask)
    return mask if isinstance(mask, MaskFile) else None


def _from_file(file: MaskFile, pull: float | None, anchor: str | Path | None, steps: float | None) -> Constraint:
    label, names = str(file.path), file.names
    if file.kind == "mask":
        return Constraint(kind="mask", label=label, names=names, flags=lambda n, s: _flags(file, n, s))
    basis: Callable[[str, Shape], Basis] = lambda n, s: _basis(*file.modes(n, s))  # noqa: E731
    if pull is None:
        return Constraint(kind="subspace", label=label, names=names, basis=basis)
    basis_of = file.options.get("basis")
    if basis_of not in (None, "activation"):
        raise OptionError(f"{label}: a pull is for --basis activation, and this is --basis {basis_of}")
    if steps is None:
        raise OptionError(
            f"{label}: a soft subspace is pulled over a whole course; say how long it is, in steps at the peak rate: "
            "constrain(..., steps=...)"
        )
    shared: dict[bytes, Tensor] = {}
    soft: Callable[[str, Shape], Pull] = lambda n, s: _pull(file, n, s, pull / steps, shared)  # noqa: E731
    start = None if anchor is None else _Anchor(anchor)
    return Constraint(kind="subspace", label=label, names=names, basis=basis, pull=soft, anchor=start)


def _refuse_our_own(path: Path) -> None:
    """Raise CheckpointError for files of fisherkit: a Fisher has a model's names and shapes, too."""
    beside = path.with_suffix(".json")
    made = parse_json(beside, beside.read_bytes(), "file")
    if str(made.get("format", "")).startswith("fisherkit."):
        raise CheckpointError(f"{path}: is a {made.get('kind', 'Fisher')}, not a model; anchor is a checkpoint")


class _Anchor:
    """Weights of a checkpoint by the names of a mask, whatever prefix it spells them with; float32."""

    def __init__(self, reference: str | Path) -> None:
        self._index = open_index(resolve_model(str(reference)).path)
        if self._index.path.with_suffix(".json").is_file() and self._index.path.suffix in (".safetensors", ".pt"):
            _refuse_our_own(self._index.path)
        self._names = {spelling(name): name for name in self._index.tensors}

    def __call__(self, name: str, shape: Shape) -> Tensor:
        found = self._names.get(spelling(name))
        path = self._index.path
        if found is None:
            raise CheckpointError(f"{path}: has no weight {name!r}, so it cannot be the anchor of this model")
        info = self._index.tensors[found]
        if info.shape != shape:
            raise CheckpointError(f"{path}: {found} is {list(info.shape)}, and {list(shape)} in this model")
        with ArrayReader(self._index) as reader:
            return torch.from_numpy(widen(reader.read(found), info.dtype).reshape(shape))


def _pull(file: MaskFile, name: str, shape: Shape, pull: float, shared: dict[bytes, Tensor]) -> Pull:
    """Return what a step pulls; the same directions, as those of q, k and v are, are one tensor in ``shared``."""
    u, s, v = file.modes(name, shape)
    directions = v if u is None else u
    if s is None or directions is None or (u is not None and v is not None):
        raise OptionError(f"{file.path}: a pull takes directions of one side with their spectrum; --basis activation")
    if (s < 0).any():
        raise CheckpointError(f"{file.path}: the spectrum of {name} has negative values; make the subspace anew")
    strengths = pull_strengths(pull, s, directions.shape[-2])
    own = shared.setdefault(hashlib.sha256(directions.tobytes()).digest(), torch.from_numpy(directions))
    return Pull(own, torch.from_numpy(strengths), axis=0 if v is None else 1)


def _flags(file: MaskFile, name: str, shape: Shape) -> Tensor:
    return torch.from_numpy(file.read(name, shape))


def _basis(u: Any, s: Any, v: Any) -> Basis:
    return Basis(*(None if part is None else torch.from_numpy(part) for part in (u, v)))


def _from_tensors(tensors: Mapping[str, Any]) -> Constraint:
    if all(isinstance(value, Tensor) and value.dtype == torch.bool for value in tensors.values()):
        return Constraint(
            kind="mask", label="the mask", names=tuple(tensors), flags=lambda n, s: _fitted(tensors, n, s)
        )
    stems = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    if all(name.rpartition(".")[2] in SIDES and _is_floating(value) for name, value in tensors.items()):
        return Constraint(
            kind="subspace", label="the subspace", names=tuple(stems), basis=lambda n, s: _given(tensors, n, s)
        )
    odd = next(name for name, value in tensors.items() if not isinstance(value, Tensor) or value.dtype != torch.bool)
    raise CheckpointError(f"{odd!r} of the mask is no bool tensor; True = may change (or give <name>.U and <name>.V)")


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _fitted(tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    flags = tensors[name]
    try:
        return flags.view(fit_shape(tuple(flags.shape), shape))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}; it was made for another model") from None


def _given(tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Basis:
    parts = [tensors.get(f"{name}.{side}") for side in SIDES]
    if not spans([None if part is None else tuple(part.shape) for part in parts], shape):
        raise CheckpointError(f"the modes of {name} do not fit a weight of {list(shape)}; they are another model's")
    return Basis(*(None if part is None else part.detach().float() for part in (parts[0], parts[2])))
