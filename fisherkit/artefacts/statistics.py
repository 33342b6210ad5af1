"""Input of ``inspect``: one entry per tensor, from the statistics beside a Fisher or from the tensors themselves.

The statistics (``fisher.json`` beside ``fisher.pt``) are used when they belong to the file: its size, a hash of sampled
content and, where a header can be read without loading it, tensors and shapes are compared. Then nothing here imports
torch. Otherwise every tensor is read once, a few megabytes at a time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fisherkit.artefacts.fisher_sidecar import SCHEMA, why_not_of
from fisherkit.artefacts.layer_importance import LayerRow, parse_rows
from fisherkit.checkpoint.index import CheckpointIndex, TensorInfo, open_index
from fisherkit.checkpoint.names.location import block_prefix, locate
from fisherkit.checkpoint.schema import check, parse_file, read_beside
from fisherkit.errors import CheckpointError
from fisherkit.kernels.histogram import Histogram
from fisherkit.progress import Track

if TYPE_CHECKING:
    from fisherkit.checkpoint.torch_reader import Reader
    from fisherkit.kernels.stats import TensorStats

Kind = Literal["fisher", "mask", "subspace", "checkpoint", "importance"]

_ROWS_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor: where it sits and what is in it. Figures are of magnitudes; see kernels.stats.

    Of a mask, ``sum`` counts the weights that may change. Of a subspace it is the share of energy held, times the
    weights; ``rank`` is the number of modes and ``effective_rank`` that which the matrix spreads over.
    """

    name: str
    layer: int | None
    layer_name: str
    module: str
    weights: int
    sum: float
    max: float = math.nan
    zeros: int = 0
    nonfinite: int = 0
    rank: int = 0
    effective_rank: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A Fisher, a mask, a subspace, a plain checkpoint, or a ``layer_importance.json``.

    Attributes:
        kind: what the file holds.
        path: the file or folder.
        entries: one per tensor, in the file's order (one per layer for ``importance``).
        histogram: of all tensors together.
        provenance: how it was made, as extract or mask wrote it; None when nothing was written.
        notes: what a person should know about how this was read.
    """

    kind: Kind
    path: Path
    entries: tuple[Entry, ...]
    histogram: Histogram = field(default_factory=Histogram)
    provenance: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


_NOT_INSPECTED = {
    "fisherkit.delta/": "a sparse delta, which has no summary; `fisherkit merge BASE DELTA OUT` applies it",
    "fisherkit.activations/": "activation statistics, which have no summary; "
    "`mask --basis activation` and `merge --regmean` read them",
}


def read_source(path: Path, track: Track | None = None) -> Source:
    """Read the statistics of a file or folder of tensors, or of the JSON beside one.

    Args:
        path: a Fisher, mask, subspace or checkpoint; or a sidecar, a mask's JSON, a ``layer_importance.json``.
        track: progress, called where tensors are read.

    Raises:
        CheckpointError: nothing there, damaged, or nothing that has a summary.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        return _read_json(path)
    sidecar = _beside(path)
    found = read_beside(sidecar)
    form = str(found.get("format", "")) if found is not None else ""
    if found is not None and form.startswith("fisherkit.fisher/"):
        stale = why_not_of(found, path)
        if stale is not None:
            note = f"{sidecar.name} does not belong to this file ({stale}): reading the tensors instead"
            return _read_tensors(path, track, (note,))
        return _from_sidecar(found, path, _unhashed(found, sidecar, path))
    if found is not None and form.startswith("fisherkit.mask/"):
        return _from_mask(found, path)
    for kind, use in _NOT_INSPECTED.items():
        if form.startswith(kind):
            raise CheckpointError(f"{path}: holds {use}")
    return _read_tensors(path, track, ())


def provenance_of(path: Path) -> Mapping[str, Any] | None:
    """Return how a Fisher was made, as extract wrote beside it; None where nothing is there that belongs to it.

    Raises:
        CheckpointError: there is a JSON that cannot be read.
    """
    found = read_beside(_beside(path))
    if found is None or why_not_of(found, path) is not None:
        return None
    return {key: value for key, value in found.items() if key not in {"tensors", "histogram"}}


def stale_note(path: Path) -> str | None:
    """Say that the sidecar beside a Fisher is another's, so that nothing is known of how it was made; else None.

    Raises:
        CheckpointError: there is a JSON that cannot be read.
    """
    found = read_beside(_beside(path))
    if found is None or not str(found.get("format", "")).startswith("fisherkit.fisher/"):
        return None
    stale = why_not_of(found, path)
    return f"{_beside(path).name} does not belong to {path.name} ({stale}): it is not used" if stale else None


def _beside(path: Path) -> Path:
    """Return where a JSON would lie that describes these tensors."""
    return path / "fisher.json" if path.is_dir() else path.with_suffix(".json")


def _unhashed(sidecar: Mapping[str, Any], beside: Path, path: Path) -> tuple[str, ...]:
    """Say that a sidecar of the first builds is believed without proof."""
    if "content_sha256" in sidecar:
        return ()
    return (f"{beside.name} is old and notes no hash: only size, names and shapes say that it is {path.name}'s",)


def _read_json(path: Path) -> Source:
    content = parse_file(path, "what is there")
    form = str(content.get("format", "")) if isinstance(content, dict) else ""
    if form.startswith("fisherkit.fisher/"):
        check(path, content, "a Fisher", SCHEMA, "run extract again or inspect the tensor file itself")
        return _from_sidecar(content, path, ())
    if form.startswith("fisherkit.mask/"):
        return _from_mask(content, path.with_name(str(content.get("file"))))
    if isinstance(content, dict) and "format" in content:
        raise CheckpointError(f"{path}: neither statistics of a Fisher nor a layer_importance.json")
    return _from_importance(content, path)


# The statistics that extract wrote


def _from_sidecar(sidecar: Mapping[str, Any], path: Path, notes: tuple[str, ...]) -> Source:
    return Source(
        kind="fisher",
        path=path,
        entries=_sidecar_entries(sidecar),
        histogram=_histogram(sidecar, path),
        provenance={key: value for key, value in sidecar.items() if key not in {"tensors", "histogram"}},
        notes=notes,
    )


def _histogram(sidecar: Mapping[str, Any], path: Path) -> Histogram:
    try:
        return Histogram.from_json(sidecar["histogram"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not describe a Fisher: {error}") from None


def _sidecar_entries(sidecar: Mapping[str, Any]) -> tuple[Entry, ...]:
    return _placed(
        {
            name: {
                "weights": math.prod(info["shape"]),
                "sum": _number(info["sum"]),
                "max": _number(info["max"]),
                "zeros": int(info["zeros"]),
                "nonfinite": int(info["nonfinite"]),
            }
            for name, info in sidecar["tensors"].items()
        }
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _placed(figures: Mapping[str, Mapping[str, Any]]) -> tuple[Entry, ...]:
    blocks = block_prefix(figures)
    places = {name: locate(name, blocks) for name in figures}
    return tuple(Entry(name=name, **vars(places[name]), **known) for name, known in figures.items())


# What mask wrote


def _from_mask(made: Mapping[str, Any], path: Path) -> Source:
    """A mask or subspace with its description; raises CheckpointError where the two do not fit."""
    from fisherkit.artefacts.mask_file import open_mask  # brings numpy in

    with open_mask(path) as file:
        found = {name: entry for name in file.names if (entry := file.entry(name)) is not None}
        kind = file.kind
    figures: dict[str, dict[str, Any]] = {}
    for name, entry in found.items():
        if kind == "mask":
            figures[name] = {"sum": float(entry.kept), "max": float(entry.kept > 0), "zeros": entry.numel - entry.kept}
        else:
            figures[name] = _modes_figures(made["tensors"][name], entry.numel)
        figures[name]["weights"] = entry.numel
    provenance = {key: value for key, value in made.items() if key != "tensors"}
    return Source(kind=kind, path=path, entries=_placed(figures), provenance=provenance)


def _modes_figures(row: Mapping[str, Any], weights: int) -> dict[str, Any]:
    energy = _number(row.get("energy"))
    known = {"rank": int(row.get("rank") or 0), "effective_rank": _number(row.get("effective_rank"))}
    return {"sum": energy * weights, "max": energy, **known}


# The tensors themselves


def _read_tensors(path: Path, track: Track | None, notes: tuple[str, ...]) -> Source:
    from fisherkit.checkpoint.torch_reader import Reader
    from fisherkit.kernels.compiled import switch_on
    from fisherkit.kernels.side_by_side import side_by_side
    from fisherkit.kernels.stats import TensorStats

    index = open_index(path)
    infos = list(index.tensors.values())
    switch_on(sum(info.numel for info in infos))
    with Reader(index) as reader:
        measured = side_by_side(
            lambda info: measure(reader, info),
            infos,
            [info.nbytes for info in infos],
            lambda done: None if track is None else track("reading", done, len(infos)),
        )
    stats = {info.name: found for info, found in zip(infos, measured, strict=True)}
    total = sum(stats.values(), TensorStats())
    keys = ("sum", "max", "zeros", "nonfinite")
    figures = {
        name: {"weights": found.numel, **{key: getattr(found, key) for key in keys}} for name, found in stats.items()
    }
    kind = _kind(index, path, total.negative)
    if kind == "mask":  # of a mask by rows the shapes are in the JSON that this file lacks
        notes += (f"{path.name} has no JSON beside it: flags are counted as stored, one where it may mean a whole row",)
    return Source(
        kind=kind,
        path=path,
        entries=_placed(figures),
        histogram=total.histogram,
        notes=notes,
    )


def measure(reader: "Reader", info: TensorInfo, *, rows_bytes: int = _ROWS_BYTES) -> "TensorStats":
    """Statistics of one tensor, read ``rows_bytes`` at a time so that memory stays constant."""
    from fisherkit.kernels.stats import TensorStats, tensor_stats

    if info.nbytes <= rows_bytes:
        return tensor_stats(reader.read(info.name))
    rows = max(1, rows_bytes * info.shape[0] // info.nbytes)
    pieces = (
        reader.read_rows(info.name, start, min(start + rows, info.shape[0])) for start in range(0, info.shape[0], rows)
    )
    return sum(map(tensor_stats, pieces), TensorStats())


def _kind(index: CheckpointIndex, path: Path, negative: int) -> Kind:
    dtypes = {info.dtype for info in index.tensors.values()}
    if dtypes == {"BOOL"}:
        return "mask"
    if dtypes == {"U8"}:
        raise CheckpointError(f"{path}: holds packed bits, whose shapes are in {path.stem}.json; put that beside it")
    return "checkpoint" if negative or (path / "config.json").is_file() else "fisher"


# layer_importance.json


def _from_importance(content: Any, path: Path) -> Source:
    rows = parse_rows(content, f"{path}: neither statistics of a Fisher nor a layer_importance.json")
    return Source(kind="importance", path=path, entries=tuple(map(_layer, rows)))


def _layer(row: LayerRow) -> Entry:
    return Entry(
        name=row.name, layer=row.layer, layer_name=row.name, module="", weights=row.weights, sum=_number(row.sum)
    )
