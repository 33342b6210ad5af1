"""The file of second moments beside a Fisher: where it is, what describes it, and how it is read again.

``<stem>.activations.safetensors`` holds in float32, for every distinct input of a linear layer, ``<tensor>.input``:
E[x x^T] [in, in]; and for every layer ``<tensor>.output``: E[g g^T] [out, out] of the gradients at its output. A large
one is [size, rank]: B with orthogonal columns and E ~ B B^T, see kernels.covariance. The JSON beside it says which
weights share a moment (they read the very same tensor), and where all of it comes from. Knows no torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from fisherkit.artefacts import fisher_sidecar
from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.headers import parse_json
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.target import check_target, is_folder, swap_in
from fisherkit.checkpoint.work_folder import disk
from fisherkit.errors import CheckpointError
from fisherkit.floats import Floats, widen

FORMAT = "fisherkit.activations/1"
RULE = (
    "means over all tokens of all samples, padding left out: of x x^T, x what goes into the layer, and of g g^T, g the "
    "gradient of the sample's loss at what comes out of it"
)
Which = Literal["input", "output"]


def path_beside(fisher: Path) -> Path:
    """Where the moments of a Fisher are: ``fisher.activations.safetensors`` beside ``fisher.pt``, or in its folder."""
    if is_folder(fisher):
        return fisher / "fisher.activations.safetensors"
    return fisher.with_name(f"{fisher.stem}.activations.safetensors")


def check_free(fisher: Path, *, force: bool) -> None:
    """Refuse what could not be written beside a Fisher in the end; a folder is checked as a whole elsewhere.

    Raises:
        OutputError: something is there that must not be replaced.
    """
    if not is_folder(fisher):
        check_target(path_beside(fisher), force=force)
        fisher_sidecar.check_sidecar(path_beside(fisher))


def put_in_place(fisher: Path, work: Path, provenance: Mapping[str, Any], described: Mapping[str, Any]) -> list[Path]:
    """Rename the finished moments out of the work folder, unless a killed run did already, and describe them.

    Args:
        fisher: what they lie beside; it is in its place.
        work: the work folder.
        provenance: the Fisher's.
        described: ``moments`` and ``left_out`` of the JSON.

    Returns:
        The files.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    target = path_beside(fisher)
    staged = work / target.name
    if staged.exists():
        fisher_sidecar.sidecar_path(target).unlink(missing_ok=True)
        with disk(target):
            swap_in(staged, target)
    about = {"format": FORMAT, "kind": "activations", "file": target.name, "file_bytes": target.stat().st_size}
    fisher_sidecar.write_json(fisher_sidecar.sidecar_path(target), {**provenance, **about, "rule": RULE, **described})
    return [target, fisher_sidecar.sidecar_path(target)]


class Covariance(NamedTuple):
    """A second moment [size, size], or its factor B [size, rank].

    Attributes:
        name: of the stored tensor; weights that share it have the same.
        values: float32.
        is_factor: whether they are B.
        trace: of the moment itself.
    """

    name: str
    values: Floats
    is_factor: bool
    trace: float


class Activations:
    """An open file of moments; a context.

    Raises:
        CheckpointError: not there, damaged, or not described by the JSON beside it.
    """

    def __init__(self, path: Path) -> None:
        beside = path.with_suffix(".json")
        try:
            made = parse_json(beside, beside.read_bytes(), "description of the activations")
        except OSError as error:
            raise CheckpointError(
                f"{beside}: cannot be read ({error.strerror}); `extract --statistics activations` writes it and "
                f"{path.name} together"
            ) from None
        rows = made.get("moments")
        if made.get("format") != FORMAT or not isinstance(rows, dict) or made.get("file") != path.name:
            raise CheckpointError(f"{beside}: does not describe {path.name} (format {FORMAT!r})")
        index = open_index(path)
        if rows.keys() != index.tensors.keys():
            raise CheckpointError(f"{path}: other tensors than {beside.name} describes; extract them anew")
        self.path = path
        self.provenance = {key: value for key, value in made.items() if key not in ("moments", "left_out")}
        self._rows: Mapping[str, Mapping[str, Any]] = rows
        self._of = {(row["side"], tensor): name for name, row in rows.items() for tensor in row["tensors"]}
        self._reader = ArrayReader(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, at)

    def moment_of(self, weight: str, side: Which) -> str | None:
        """Name of the moment of a weight, by its checkpoint name; None where it has none."""
        return self._of.get((side, weight))

    def size(self, moment: str) -> int:
        """Its channels."""
        return int(self._rows[moment]["size"])

    def read(self, moment: str) -> Covariance:
        """The values of a moment.

        Raises:
            CheckpointError: they are not finite.
        """
        info, row = self._reader.info(moment), self._rows[moment]
        values = widen(self._reader.read(moment), info.dtype).reshape(info.shape)
        return Covariance(moment, values, row["sketch_rank"] is not None, float(row["trace"]))

    def check_model(self, provenance: Mapping[str, Any] | None, weights: Sequence[str]) -> None:
        """Hold it against the Fisher that it is to be used with.

        Raises:
            CheckpointError: it was measured on other weights, or speaks of none of these.
        """
        ours, theirs = ((made or {}).get("model", {}).get("weights_sha256") for made in (self.provenance, provenance))
        if ours and theirs and ours != theirs:
            raise CheckpointError(f"{self.path}: was measured on other weights than the Fisher; extract both from one")
        if not any(self.moment_of(name, "input") for name in weights):
            raise CheckpointError(f"{self.path}: has no moment of any weight of the Fisher; it is of another model")
