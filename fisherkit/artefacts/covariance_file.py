"""File of covariances beside a Fisher: where it is, what describes it, and how it is read again.

A covariance here is the uncentered one, a mean of outer products. ``<stem>.activations.safetensors`` holds, for every
distinct input of a linear layer, ``<tensor>.input``: E[x x^T] [in, in]; and for every layer, where outputs were asked
for, ``<tensor>.output``: E[g g^T] [out, out] of the gradients at its output. Of a whole one the upper triangle is
stored, row after row, in float32 (in files of format 1 all of it). A large one is [size, rank], in float32 or bfloat16:
a factor B with orthogonal columns and E ~ B B^T, see kernels.covariance. The JSON beside it says under ``moments``
which weights share a covariance (they read the very same tensor), and where all of it comes from. Knows no torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.schema import (
    anything,
    listed,
    maybe,
    named,
    number,
    read_beside,
    read_object,
    table,
    text,
    whole,
)
from fisherkit.checkpoint.target import is_folder
from fisherkit.errors import CheckpointError
from fisherkit.floats import Floats, widen

FORMAT = "fisherkit.activations/2"
_WHOLE_FORMAT = "fisherkit.activations/1"  # as 2, but for triangles
RULE = (
    "means over all tokens of all samples, padding left out: of x x^T, x what goes into the layer, and of g g^T, g the "
    "gradient of the sample's loss at what comes out of it"
)
Which = Literal["input", "output"]
_ROW = table(
    {
        "side": text("input", "output"),
        "tensors": listed(text(), 1),
        "size": whole(1),
        "sketch_rank": maybe(whole(1)),
        "trace": number(0),
    },
    {
        "layer": maybe(whole()),
        "tokens": whole(),
        "energy": number(),
        "dtype": text("F32", "BF16"),
        "rounding": number(0),
    },
)
SCHEMA = table(
    {"format": text(FORMAT, _WHOLE_FORMAT), "file": text(), "moments": named(_ROW)},
    {"content_sha256": text(), "model": named(anything), "left_out": listed(text())},
)
"""The JSON beside the file; see checkpoint.schema."""


def path_beside(fisher: Path) -> Path:
    """Return where the covariances of a Fisher are: ``fisher.activations.safetensors`` beside it, or in its folder."""
    if is_folder(fisher):
        return fisher / "fisher.activations.safetensors"
    return fisher.with_name(f"{fisher.stem}.activations.safetensors")


def find_covariances(path: Path) -> Path:
    """Return the file of covariances that is meant by a path: the file itself, or the Fisher that it lies beside."""
    if path.suffix.lower() == ".safetensors":
        made = path.with_suffix(".json")
        if not made.is_file() or not str((read_beside(made) or {}).get("format")).startswith("fisherkit.fisher/"):
            return path
    elif path.suffix.lower() != ".pt" and not path.is_dir():
        raise CheckpointError(f"{path}: no file of covariances; `extract --statistics inputs` writes one")
    return path_beside(path)


def is_covariances(made: Mapping[str, Any]) -> bool:
    """Return whether a JSON describes covariances."""
    return str(made.get("format", "")).startswith("fisherkit.activations/")


def description(
    staged: Path, provenance: Mapping[str, Any], rows: Mapping[str, Any], without: Sequence[str]
) -> dict[str, Any]:
    """Return the JSON beside a file of covariances.

    Args:
        staged: the finished file, under its own name.
        provenance: the Fisher's.
        rows: per covariance its ``side``, ``tensors``, ``layer``, ``size``, ``sketch_rank`` and figures.
        without: matrices of the Fisher that have no covariance.
    """
    about = {
        "format": FORMAT,
        "kind": "activations",
        "file": staged.name,
        "file_bytes": staged.stat().st_size,
        "content_sha256": content_sha256(staged),
    }
    return {**provenance, **about, "rule": RULE, "moments": dict(rows), "left_out": list(without)}


def _wanted(row: Mapping[str, Any], form: str) -> tuple[str, tuple[int, ...]]:
    """Return type and shape of the tensor that a row of the JSON describes, in a format."""
    size, rank, code = row["size"], row["sketch_rank"], row.get("dtype", "F32")
    if rank is not None:
        return code, (size, rank)
    return code, (size, size) if form == _WHOLE_FORMAT else (size * (size + 1) // 2,)


def _unpacked(triangle: Floats, size: int) -> Floats:
    """Return the symmetric matrix [size, size] of its upper triangle, which lies row after row."""
    matrix, at = np.empty((size, size), np.float32), 0
    for row in range(size):
        matrix[row, row:] = matrix[row:, row] = triangle[at : at + size - row]
        at += size - row
    return matrix


class StoredCovariance(NamedTuple):
    """A covariance as it lies in the file.

    Attributes:
        name: of the stored tensor; weights that share it have the same.
        values: float32: the covariance [size, size], or its factor B [size, rank].
        is_factor: True for the factor.
        trace: sum of the diagonal of the covariance itself.
    """

    name: str
    values: Floats
    is_factor: bool
    trace: float


class CovarianceFile:
    """An open file of covariances; a context.

    Args:
        path: the ``.safetensors`` file; its JSON lies beside it.

    Raises:
        CheckpointError: not there, damaged, or not described by the JSON beside it.
    """

    def __init__(self, path: Path) -> None:
        beside = path.with_suffix(".json")
        if not beside.is_file():
            raise CheckpointError(
                f"{beside}: is missing; `extract --statistics activations` (or inputs) writes it beside"
            )
        made = read_object(beside, "activations", SCHEMA, "extract them anew")
        if made["file"] != path.name:
            raise CheckpointError(f"{beside}: belongs to {made['file']!r}, not to {path.name}; rename the two alike")
        rows, index = made["moments"], open_index(path)
        if {name: _wanted(row, made["format"]) for name, row in rows.items()} != {
            info.name: (info.dtype, info.shape) for info in index.tensors.values()
        }:
            raise CheckpointError(f"{path}: other tensors than {beside.name} describes; extract them anew")
        if "content_sha256" in made and made["content_sha256"] != index.fingerprint():
            raise CheckpointError(f"{beside}: describes another file than this {path.name}; extract both anew")
        self.path = path
        self.provenance = {key: value for key, value in made.items() if key not in ("moments", "left_out")}
        self.rows: Mapping[str, Mapping[str, Any]] = rows
        """Per covariance what the JSON says of it."""
        self.left_out: Sequence[str] = made.get("left_out", ())
        self._of = {(row["side"], tensor): name for name, row in rows.items() for tensor in row["tensors"]}
        self._reader = ArrayReader(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, at)

    def covariance_of(self, weight: str, side: Which) -> str | None:
        """Return the name of a weight's covariance, by the weight's checkpoint name; None where it has none."""
        return self._of.get((side, weight))

    def weights(self, side: Which) -> list[str]:
        """Return the checkpoint names of all weights that have a covariance of this side."""
        return [weight for of, weight in self._of if of == side]

    @property
    def measured_on(self) -> str | None:
        """Fingerprint of the weights of the model; None where the JSON does not say."""
        model = self.provenance.get("model", {})
        return model.get("weights_sha256") if isinstance(model, Mapping) else None

    def energy(self, covariance: str) -> float:
        """Return the share of the trace that the stored values hold: 1, or what a factor holds."""
        return min(1.0, float(self.rows[covariance].get("energy", 1.0)))

    def size(self, covariance: str) -> int:
        """Return the number of its channels."""
        return int(self.rows[covariance]["size"])

    def read(self, covariance: str) -> StoredCovariance:
        """Read the values of a covariance, by its name.

        Raises:
            CheckpointError: the file ends early, or a value is not finite, or a factor has no orthogonal columns.
        """
        info, row = self._reader.info(covariance), self.rows[covariance]
        values = widen(self._reader.read(covariance), info.dtype).reshape(info.shape)
        is_factor = row["sketch_rank"] is not None
        tolerance = 1e-3 if info.dtype == "F32" else 1e-2
        if not np.isfinite(values).all() or (is_factor and not _orthogonal(values, tolerance)):
            kind = "the factor that its JSON says" if is_factor else "a covariance"
            raise CheckpointError(f"{self.path}: {covariance} is not {kind}; extract them anew")
        if values.ndim == 1:
            values = _unpacked(values, row["size"])
        return StoredCovariance(covariance, values, is_factor, float(row["trace"]))

    def check_model(self, provenance: Mapping[str, Any] | None, weights: Sequence[str]) -> None:
        """Hold the file against the Fisher that it is to be used with.

        Args:
            provenance: the Fisher's; None where nothing is known.
            weights: checkpoint names of the Fisher's tensors.

        Raises:
            CheckpointError: it was measured on other weights, or speaks of none of these.
        """
        ours, theirs = ((made or {}).get("model", {}).get("weights_sha256") for made in (self.provenance, provenance))
        if ours and theirs and ours != theirs:
            raise CheckpointError(f"{self.path}: was measured on other weights than the Fisher; extract both from one")
        if not any(self.covariance_of(name, "input") for name in weights):
            raise CheckpointError(f"{self.path}: has no covariance of any weight of the Fisher; it is of another model")


def _orthogonal(factor: Floats, tolerance: float) -> bool:
    """Return whether the columns of a factor [size, rank] are orthogonal, judged by 64 of them spread over all.

    A whole covariance that is taken for a factor has columns that lean on each other; a factor's differ from
    orthogonal by rounding, far below a thousandth of the longest one's square in float32.
    """
    columns = factor[:, :: -(-factor.shape[1] // 64)].astype(np.float64)
    products = columns.T @ columns
    squares = np.diagonal(products).copy()
    np.fill_diagonal(products, 0)
    return bool(np.abs(products).max(initial=0) <= tolerance * squares.max(initial=0))
