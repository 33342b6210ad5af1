"""Files of covariances, made of inputs that a test knows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fisherkit.artefacts import covariance_file
from fisherkit.checkpoint.index import open_index

Doubles = NDArray[np.float64]
Inputs = Mapping[tuple[str, ...], Doubles]
"""Rows [T, N] that go into the weights of these names."""


def covariance(rows: Doubles) -> Doubles:
    """E[x x^T] over rows."""
    return rows.T @ rows / len(rows)


def factor(matrix: Doubles, rank: int) -> Doubles:
    """B [N, rank] with orthogonal columns, longest first, of the leading eigenvectors."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1][:, :rank]


def write(path: Path, inputs: Inputs, *, model: Path | None = None, rank: int | None = None) -> Path:
    """A file and its JSON as extract writes them, in full or as factors; ``model`` is what it was measured on."""
    stored, rows = {}, {}
    for weights, given in inputs.items():
        matrix = covariance(given)
        kept = matrix if rank is None else factor(matrix, rank)
        name = f"{weights[0]}.input"
        held = kept if rank is not None else kept[np.triu_indices(len(kept))]
        stored[name] = np.ascontiguousarray(held, np.float32)
        energy = float(np.trace(matrix)) if rank is None else float(np.square(kept).sum())
        rows[name] = _row(weights, matrix, rank, energy)
    safetensors.numpy.save_file(stored, path, metadata={"format": "pt"})
    about: dict[str, Any] = {}
    if model is not None:
        about["model"] = {"id": "m", "weights_sha256": open_index(model).fingerprint()}
    path.with_suffix(".json").write_text(json.dumps(covariance_file.description(path, about, rows, [])))
    return path


def _row(weights: Sequence[str], matrix: Doubles, rank: int | None, energy: float) -> dict[str, Any]:
    trace = float(np.trace(matrix))
    return {
        "side": "input",
        "tensors": list(weights),
        "layer": 0,
        "size": len(matrix),
        "sketch_rank": rank,
        "tokens": 1,
        "trace": trace,
        "energy": min(1.0, energy / trace) if trace else 1.0,
    }
