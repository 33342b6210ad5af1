"""Two files entry by entry: do they agree on which weights matter?

Per tensor: Spearman's rank correlation (on at most a million positions drawn with a fixed seed) and the share of the
first file's largest 10 and 30 % that are among the second's largest as well (exact; ties by index; two unrelated
tensors overlap by 0.1 and 0.3). Rows of several tensors hold the mean over tensors, weighted by size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fisherkit.checkpoint.index import CheckpointIndex, open_index
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.methods.sources import Source, Track

if TYPE_CHECKING:
    from torch import Tensor

TOP = (0.1, 0.3)


@dataclass(frozen=True)
class Agreement:
    """How far two tensors agree; NaN where that is undefined (a constant tensor has no ranks).

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
class Comparison:
    """How far the other file agrees.

    Attributes:
        path: the other file.
        tensors: agreement of each tensor that both files have.
        only_here: tensors that the other file lacks.
        only_there: tensors that this file lacks.
    """

    path: Path
    tensors: Mapping[str, Agreement]
    only_here: int
    only_there: int


def compare(source: Source, other: Path, track: Track | None = None) -> Comparison:
    """Compare all tensors that two Fishers (or two checkpoints) have in common, one at a time.

    Raises:
        CheckpointError: the other file cannot be read, has no tensor in common, or another shape.
        OptionError: either file holds no numbers per weight (a mask, a JSON file).
    """
    from fisherkit.checkpoint.reader import Reader

    here, there = (_open(path) for path in (source.path, other))
    common = _common(here, there, source.path, other)
    agreements: dict[str, Agreement] = {}
    with Reader(here) as reader_here, Reader(there) as reader_there:
        for done, name in enumerate(common, start=1):
            agreements[name] = _agreement(reader_here.read(name), reader_there.read(name))
            if track is not None:
                track("comparing", done, len(common))
    return Comparison(other, agreements, len(here.tensors) - len(common), len(there.tensors) - len(common))


def mean_agreement(comparison: Comparison, names: Sequence[str]) -> Agreement | None:
    """The mean over the named tensors, weighted by size; None when none of them was compared."""
    found = [comparison.tensors[name] for name in names if name in comparison.tensors]
    if not found:
        return None
    return Agreement(sum(one.weights for one in found), *(_mean(found, column) for column in Agreement.COLUMNS))


def _mean(found: Sequence[Agreement], column: str) -> float:
    known = [one for one in found if not math.isnan(getattr(one, column))]
    weights = sum(one.weights for one in known)
    return math.fsum(one.weights * getattr(one, column) for one in known) / weights if weights else math.nan


def _open(path: Path) -> CheckpointIndex:
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        raise OptionError(f"{path}: two files are compared weight by weight; name the tensors, not a .json")
    index = open_index(path)
    if {info.dtype for info in index.tensors.values()} <= {"BOOL", "U8"}:
        raise OptionError(f"{path}: a mask has no ranks; compare two Fishers or two checkpoints")
    return index


def _common(here: CheckpointIndex, there: CheckpointIndex, path: Path, other: Path) -> list[str]:
    common = [name for name in here.tensors if name in there.tensors]
    if not common:
        raise CheckpointError(f"{path} and {other} have no tensor in common: they are not of the same model")
    for name in common:
        shapes = [tuple(index.tensors[name].shape) for index in (here, there)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{name} is {list(shapes[0])} in {path} and {list(shapes[1])} in {other}")
    return common


def _agreement(here: "Tensor", there: "Tensor") -> Agreement:
    from fisherkit.kernels.ranks import rank_correlation, top_overlap

    return Agreement(here.numel(), rank_correlation(here, there), *top_overlap(here, there, TOP))
