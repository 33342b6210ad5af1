"""Two files entry by entry: do they agree on which weights matter?

Per tensor: Spearman's rank correlation (on at most a million positions drawn with a fixed seed) and the share of the
first file's largest 10 and 30 % that are among the second's largest as well (exact; ties by index; two unrelated
tensors overlap by 0.1 and 0.3). Rows of several tensors hold the mean over tensors, weighted by size.

Two masks: the Jaccard overlap of the entries that may change, those that both allow over those that either does. Rows
of several tensors count all of their entries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fisherkit.artefacts.statistics import Source
from fisherkit.checkpoint.index import CheckpointIndex, open_index
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.progress import Track

if TYPE_CHECKING:
    from torch import Tensor

    from fisherkit.artefacts.mask_entry import Flags

Shape = tuple[int, ...]
TOP = (0.1, 0.3)


@dataclass(frozen=True)
class Agreement:
    """Agreement of two tensors; NaN where it is undefined (a constant tensor has no ranks).

    Attributes:
        weights: entries compared.
        rank_correlation: Spearman's, -1 to 1.
        overlap_10: share of the first file's largest 10 % that are among the second's.
        overlap_30: the same for 30 %.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("rank_correlation", "overlap_10", "overlap_30")

    weights: int
    rank_correlation: float
    overlap_10: float
    overlap_30: float


@dataclass(frozen=True)
class Overlap:
    """Entries that two masks let change.

    Attributes:
        weights: entries compared.
        here: how many the first lets change.
        there: how many the second does.
        both: how many both do.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("jaccard", "chance")

    weights: int
    here: int
    there: int
    both: int

    @property
    def jaccard(self) -> float:
        """Entries that both let change over those that either does; NaN where neither lets any."""
        either = self.here + self.there - self.both
        return self.both / either if either else math.nan

    @property
    def chance(self) -> float:
        """Jaccard overlap of two unrelated masks of these densities."""
        both = self.here * self.there / self.weights if self.weights else 0.0
        either = self.here + self.there - both
        return both / either if either else math.nan


@dataclass(frozen=True)
class Comparison:
    """Agreement of another file, tensor by tensor.

    Attributes:
        path: the other file.
        tensors: agreement of each tensor that both files have.
        only_here: tensors that the other file lacks.
        only_there: tensors that this file lacks.
    """

    path: Path
    tensors: Mapping[str, Agreement] | Mapping[str, Overlap]
    only_here: int
    only_there: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row has of the comparison."""
        return Overlap.COLUMNS if isinstance(next(iter(self.tensors.values())), Overlap) else Agreement.COLUMNS


def compare(source: Source, other: Path, track: Track | None = None) -> Comparison:
    """Compare all tensors that two Fishers, two checkpoints or two masks have in common, one at a time.

    Raises:
        CheckpointError: the other file cannot be read, has no tensor in common, or another shape.
        OptionError: files of two kinds, or without numbers per weight (a subspace, a JSON file).
    """
    if source.kind == "subspace":
        raise OptionError(f"{source.path}: subspaces are not compared; compare two masks, Fishers or checkpoints")
    if source.kind == "mask":
        return _compare_masks(source.path, other, track)
    from fisherkit.checkpoint.torch_reader import Reader

    here, there = (_open(path) for path in (source.path, other))
    shapes = [{name: info.shape for name, info in index.tensors.items()} for index in (here, there)]
    common = _common(shapes[0], shapes[1], source.path, other)
    agreements: dict[str, Agreement] = {}
    with Reader(here) as reader_here, Reader(there) as reader_there:
        for done, name in enumerate(common, start=1):
            agreements[name] = _agreement(reader_here.read(name), reader_there.read(name))
            if track is not None:
                track("comparing", done, len(common))
    return Comparison(other, agreements, len(here.tensors) - len(common), len(there.tensors) - len(common))


def mean_agreement(comparison: Comparison, names: Sequence[str]) -> Agreement | Overlap | None:
    """Average over the named tensors, weighted by size, or add up counts for masks; None when none was compared."""
    compared = [comparison.tensors[name] for name in names if name in comparison.tensors]
    masks = [one for one in compared if isinstance(one, Overlap)]
    ranked = [one for one in compared if isinstance(one, Agreement)]
    if masks:
        counts = [[one.weights, one.here, one.there, one.both] for one in masks]
        return Overlap(*map(sum, zip(*counts, strict=True)))
    if not ranked:
        return None
    return Agreement(sum(one.weights for one in ranked), *(_mean(ranked, column) for column in Agreement.COLUMNS))


def _mean(ranked: Sequence[Agreement], column: str) -> float:
    known = [one for one in ranked if not math.isnan(getattr(one, column))]
    weights = sum(one.weights for one in known)
    return math.fsum(one.weights * getattr(one, column) for one in known) / weights if weights else math.nan


def _open(path: Path) -> CheckpointIndex:
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        raise OptionError(f"{path}: two files are compared weight by weight; name the tensors, not a .json")
    index = open_index(path)
    if {info.dtype for info in index.tensors.values()} <= {"BOOL", "U8"}:
        raise OptionError(f"{path}: a mask has no ranks; compare two Fishers or two checkpoints")
    return index


def _common(here: Mapping[str, Shape | None], there: Mapping[str, Shape | None], path: Path, other: Path) -> list[str]:
    """Names that both have; shapes are held against each other where both are known."""
    common = [name for name in here if name in there]
    if not common:
        raise CheckpointError(f"{path} and {other} have no tensor in common: they are not of the same model")
    for name in common:
        one, two = here[name], there[name]
        if one is not None and two is not None and one != two:
            raise CheckpointError(f"{name} is {list(one)} in {path} and {list(two)} in {other}")
    return common


def _compare_masks(path: Path, other: Path, track: Track | None) -> Comparison:
    from fisherkit.artefacts.mask_file import open_mask  # brings numpy in

    with open_mask(path) as here, open_mask(other) as there:
        if there.kind != "mask":
            raise OptionError(f"{other}: is a {there.kind}; a mask is compared with a mask")
        shapes = [{name: file.shape(name) for name in file.names} for file in (here, there)]
        common = _common(shapes[0], shapes[1], path, other)
        overlaps: dict[str, Overlap] = {}
        for done, name in enumerate(common, start=1):
            shape = here.shape(name) or there.shape(name)
            overlaps[name] = _overlap(here.read(name, shape), there.read(name, shape), shape)
            if track is not None:
                track("comparing", done, len(common))
    return Comparison(other, overlaps, len(here.names) - len(common), len(there.names) - len(common))


def _overlap(here: "Flags", there: "Flags", shape: Shape | None) -> Overlap:
    """Counts of entries, whichever axes the flags are spread over."""
    import numpy as np

    if shape is None and here.shape != there.shape:
        raise CheckpointError(
            f"flags of {list(here.shape)} and {list(there.shape)}: only a .json beside them tells more"
        )
    weights = math.prod(here.shape if shape is None else shape)
    counted = (int(np.count_nonzero(flags)) * weights // max(flags.size, 1) for flags in (here, there, here & there))
    return Overlap(weights, *counted)


def _agreement(here: "Tensor", there: "Tensor") -> Agreement:
    from fisherkit.kernels.ranks import rank_correlation, top_overlap

    return Agreement(here.numel(), rank_correlation(here, there), *top_overlap(here, there, TOP))
