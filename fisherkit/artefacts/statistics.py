"""What ``inspect`` reads: one entry per tensor, from the statistics beside a Fisher or from the tensors themselves.

The statistics (``fisher.json`` beside ``fisher.pt``) are used when they belong to the file, which is checked against
its size and, where a header can be read without loading it, its tensors and shapes. Then nothing here imports torch.
Otherwise every tensor is read once, a few megabytes at a time.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fisherkit.artefacts.fisher_sidecar import FORMAT
from fisherkit.checkpoint.index import CheckpointIndex, TensorInfo, open_index
from fisherkit.checkpoint.names.location import block_prefix, locate
from fisherkit.errors import CheckpointError
from fisherkit.kernels.histogram import Histogram
from fisherkit.progress import Track

if TYPE_CHECKING:
    from fisherkit.checkpoint.torch_reader import Reader
    from fisherkit.kernels.stats import TensorStats

Kind = Literal["fisher", "mask", "subspace", "checkpoint", "importance"]
"""Progress: stage, done, total."""

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
    """What was read: a Fisher, a mask, a subspace, a plain checkpoint, or a ``layer_importance.json``.

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
    "fisherkit.activations/": "activation statistics, which have no summary; `mask --basis activation` reads them",
}


def read_source(path: Path, track: Track | None = None) -> Source:
    """Statistics of a file or folder of tensors, or of the JSON beside one; raises CheckpointError otherwise."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        return _read_json(path)
    sidecar = path / "fisher.json" if path.is_dir() else path.with_suffix(".json")
    found = _load(sidecar) if sidecar.is_file() else None
    if isinstance(found, dict) and str(found.get("format", "")).startswith("fisherkit.fisher/"):
        stale = _mismatch(found, path)
        if stale is None:
            return _from_sidecar(found, path)
        note = f"{sidecar.name} does not belong to this file ({stale}): reading the tensors instead"
        return _read_tensors(path, track, (note,))
    if isinstance(found, dict) and str(found.get("format", "")).startswith("fisherkit.mask/"):
        return _from_mask(found, path)
    for kind, use in _NOT_INSPECTED.items():
        if isinstance(found, dict) and str(found.get("format", "")).startswith(kind):
            raise CheckpointError(f"{path}: holds {use}")
    return _read_tensors(path, track, ())


def provenance_of(path: Path) -> Mapping[str, Any] | None:
    """How a Fisher was made, as extract wrote beside it; None where nothing is there that belongs to it."""
    found = _load(path / "fisher.json" if path.is_dir() else path.with_suffix(".json"))
    if not isinstance(found, dict) or _mismatch(found, path) is not None:
        return None
    return {key: value for key, value in found.items() if key not in {"tensors", "histogram"}}


def _load(path: Path) -> Any:
    """The JSON in a file, or None when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _read_json(path: Path) -> Source:
    content = _load(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        problem = _malformed(content)
        if problem:
            raise CheckpointError(f"{path}: {problem}; run extract again or inspect the tensor file itself")
        return _from_sidecar(content, path)
    if isinstance(content, dict) and str(content.get("format", "")).startswith("fisherkit.mask/"):
        return _from_mask(content, path.with_name(str(content.get("file"))))
    return _from_importance(content, path)


# The statistics that extract wrote


def _mismatch(sidecar: Mapping[str, Any], path: Path) -> str | None:
    """Why the statistics are not those of the tensors at ``path``; None when they are."""
    problem = _malformed(sidecar)
    if problem or path.suffix in {".pt", ".pth", ".bin"}:  # a pickle's tensors cannot be listed without torch
        return problem or _other_size(sidecar, path.stat().st_size)
    index = open_index(path)
    shapes = {name: list(info.shape) for name, info in index.tensors.items()}
    if shapes != {name: info["shape"] for name, info in sidecar["tensors"].items()}:
        return "other tensors"
    return _other_size(sidecar, sum(file.stat().st_size for file in {info.file for info in index.tensors.values()}))


def _malformed(sidecar: Mapping[str, Any]) -> str | None:
    if sidecar.get("format") != FORMAT:
        return f"format {sidecar.get('format')!r} is not {FORMAT}"
    try:
        _sidecar_entries(sidecar)
        Histogram.from_json(sidecar["histogram"])
        for section in ("model", "prompts", "estimator", "run"):
            dict(sidecar.get(section, {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"unreadable statistics: {type(error).__name__} {error}"
    return None


def _other_size(sidecar: Mapping[str, Any], size: int) -> str | None:
    return None if sidecar.get("file_bytes") == size else f"{sidecar.get('file_bytes')} bytes there, {size} here"


def _from_sidecar(sidecar: Mapping[str, Any], path: Path) -> Source:
    made = {key: value for key, value in sidecar.items() if key not in {"tensors", "histogram"}}
    return Source(
        kind="fisher",
        path=path,
        entries=_sidecar_entries(sidecar),
        histogram=Histogram.from_json(sidecar["histogram"]),
        provenance=made,
    )


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
    from fisherkit.kernels.stats import TensorStats

    index = open_index(path)
    stats: dict[str, TensorStats] = {}
    with Reader(index) as reader:
        for done, info in enumerate(index.tensors.values(), start=1):
            stats[info.name] = measure(reader, info)
            if track is not None:
                track("reading", done, len(index.tensors))
    total = sum(stats.values(), TensorStats())
    keys = ("sum", "max", "zeros", "nonfinite")
    figures = {
        name: {"weights": found.numel, **{key: getattr(found, key) for key in keys}} for name, found in stats.items()
    }
    return Source(
        kind=_kind(index, path, total.negative),
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
    """A ``layer_importance.json`` in any of its forms: ``{"layers": [...]}``, ``{"0": x, ...}``, ``[x, ...]``."""
    try:
        rows = content.get("layers", content) if isinstance(content, dict) else content
        if isinstance(rows, dict):
            entries = [_layer(int(layer), {"sum": value}) for layer, value in rows.items()]
        elif rows and isinstance(rows[0], dict):
            entries = [_layer(int(row["layer"]), row) for row in rows]
        else:
            entries = [_layer(layer, {"sum": value}) for layer, value in enumerate(rows)]
    except (KeyError, TypeError, ValueError, AttributeError):
        entries = []
    if not entries:
        raise CheckpointError(f"{path}: neither statistics of a Fisher nor a layer_importance.json")
    return Source(kind="importance", path=path, entries=tuple(entries))


def _layer(layer: int, row: Mapping[str, Any]) -> Entry:
    name = str(row.get("name", layer))
    weights = int(row.get("weights", 0))
    return Entry(name=name, layer=layer, layer_name=name, module="", weights=weights, sum=_number(row["sum"]))
