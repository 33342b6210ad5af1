"""``mask``: which weights of a model may change, or which directions are protected, from its Fisher.

Two directions, never mixed up. A Fisher of the *new* task: what is high may change (``train top``). A Fisher of *old*
abilities: what is high is frozen (``protect top``). In the file 1 = may change. Published choices, as presets:

- ``fggm`` (arXiv 2601.18261): scores summed over the input dimension, one per output row; of every tensor the rows
  above the 0.7-quantile, 30 %, may change.
- ``fish`` (arXiv 2111.09839): the 0.5 % of entries with the highest Fisher in the whole model may change.
- ``ssu`` (arXiv 2512.04844): the half of the input columns of every tensor that scores highest is frozen. Its authors
  score by activations (Wanda); here it is the Fisher, an arm that they tried as well.
- ``shield`` (ours, see kernels.pull): a soft subspace of the directions that hold 99 % of what goes into each layer.
  Training may move a weight in them, and every step draws it part of the way back, harder where more passes through.

Counts are exact: ``floor(keep * units)`` are the top, ties going to the lower index (and the earlier tensor, in model
order). Scores are defined in kernels.mask_scores. No mask is promised to protect: make a ``random`` one beside it.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fisherkit._version import __version__
from fisherkit.artefacts import fisher_sidecar
from fisherkit.artefacts.covariance_file import path_beside
from fisherkit.artefacts.mask_entry import Kind, MaskEntry, header
from fisherkit.artefacts.statistics import stale_note
from fisherkit.checkpoint.atomic import publish, write_json
from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.target import check_target
from fisherkit.checkpoint.work_folder import Work, is_remains, read_progress
from fisherkit.errors import OutputError
from fisherkit.methods.mask.binary import Masked, write_mask
from fisherkit.methods.mask.scores import MaskInputs
from fisherkit.options import Direction, MaskOptions
from fisherkit.pairs.parallel import BlockPool
from fisherkit.progress import Say, Track


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskReport:
    """Report of a mask.

    Attributes:
        path: the mask.
        files: it and the JSON beside it.
        kind: ``mask`` or ``subspace``.
        direction: ``train`` or ``protect``: what was made of the top.
        tensors: how many weights the mask speaks of.
        weights: how many entries they have.
        kept: entries that may change; None for a subspace.
        density: ``kept / weights``.
        units: what was ranked: entries, rows or columns; None for a subspace.
        selected: how many of them are the top.
        modes: directions that are protected; None for a binary mask.
        energy: share of the matrices' sums of squares that they hold, the mean over weights.
        unreached: tensors and experts whose Fisher is zero throughout.
        notes: what a person should know.
        seconds: how long it took.
    """

    path: Path
    files: tuple[Path, ...]
    kind: Kind
    direction: Direction
    tensors: int
    weights: int
    kept: int | None = None
    density: float | None = None
    units: int | None = None
    selected: int | None = None
    modes: int | None = None
    energy: float | None = None
    unreached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return dataclasses.asdict(self) | {"path": str(self.path), "files": [str(file) for file in self.files]}


def mask(
    fisher: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: MaskOptions,
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> MaskReport:
    """Make a mask or a subspace from a Fisher.

    A binary mask is made in constant memory whatever the size of the Fisher, and without torch unless the Fisher is a
    ``.pt``. Subspaces are computed a matrix at a time.

    Args:
        fisher: a Fisher: ``.safetensors``, a folder of shards, or ``.pt``.
        out: a ``.safetensors`` file; what describes it goes into the ``.json`` beside it.
        options: see MaskOptions.
        track: progress, called with stage, done and total.
        say: gets the lines meant for a person.

    Raises:
        FisherkitError: see ``fisherkit.errors``; nothing is at ``out`` then.
    """
    started = time.monotonic()
    out = Path(out)
    with MaskInputs(Path(fisher), options) as made_from:
        was_killed = not options.force and _is_of_killed_run(out, made_from, options)
        _check_output(out, made_from, options, force=options.force or was_killed)
        with Work.start(_work_folder(out), {"command": "mask"}) as work:
            try:
                # Again: another run may have finished since.
                _check_output(out, made_from, options, force=options.force or was_killed)
                masked = _make(out, made_from, options, work.staging, track)
                _finish(out, made_from, options, masked, work.staging, was_killed=was_killed)
            finally:
                work.remove()
    stale = stale_note(Path(fisher))
    for note in (*masked.notes, *([stale] if stale else [])):
        say(f"note: {note}")
    return _report(out, options, masked, time.monotonic() - started)


def _work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _is_of_killed_run(out: Path, made_from: MaskInputs, options: MaskOptions) -> bool:
    """Return whether a run like this one was killed after the mask was in its place: its work folder is left."""
    described = fisher_sidecar.sidecar_path(out)
    if not out.is_file() or fisher_sidecar.owner(described, "options") != _settings(options, made_from):
        return False
    return read_progress(_work_folder(out)) is not None or is_remains(_work_folder(out))


def _make(out: Path, made_from: MaskInputs, options: MaskOptions, staging: Path, track: Track) -> Masked:
    if options.is_subspace and options.reads_activations:
        from fisherkit.methods.mask.activation_subspace import write_activation_subspace  # brings torch in

        return write_activation_subspace(out, made_from, options, staging, track)
    if options.is_subspace:
        from fisherkit.methods.mask.subspace import write_subspace

        return write_subspace(out, made_from, options, staging, track)
    with BlockPool() as pool:
        return write_mask(out, made_from, options, staging, pool, track)


def _check_output(out: Path, made_from: MaskInputs, options: MaskOptions, *, force: bool) -> None:
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: a mask is a .safetensors file with a .json beside it; name it mask.safetensors")
    covariances = (options.activations or path_beside(made_from.path)) if options.reads_activations else None
    given = (made_from.path, options.against, options.weights, options.delta, covariances)
    inputs = [Path(path) for path in given if path is not None and Path(path).exists()]
    if out.exists() and any(
        out.resolve() == path.resolve() or path.resolve() in out.resolve().parents for path in inputs
    ):
        raise OutputError(f"{out}: is an input of this command; choose another name")
    check_target(out, force=force)
    fisher_sidecar.check_sidecar(out)


def _finish(
    out: Path, made_from: MaskInputs, options: MaskOptions, masked: Masked, staging: Path, *, was_killed: bool
) -> None:
    """Put both files in their places: first what describes the mask, then the mask, which is refused without it.

    The mask of a killed run (``was_killed``) is replaced by the same one alone.
    """
    masked.writer.seal()
    made = header(
        "subspace" if options.is_subspace else "mask",
        out.name,
        masked.entries,
        direction=_direction(options),
        options=_settings(options, made_from),
        fisher=made_from.provenance or {"file": made_from.path.name},
    )
    for name, details in masked.details.items():
        made["tensors"][name] |= details
    version = {"fisherkit": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    facts = {"units": masked.units, "selected": masked.selected, "unreached": list(masked.unreached)}
    made["content_sha256"] = content_sha256(staging / out.name)
    beside = fisher_sidecar.sidecar_path(out)
    write_json(staging / beside.name, made | version | facts | {"notes": list(masked.notes)})
    is_same = was_killed and fisher_sidecar.owner(beside, "content_sha256") == made["content_sha256"]
    _check_output(out, made_from, options, force=options.force or is_same)  # again: hours may have passed
    publish([(staging / path.name, path) for path in (beside, out)])


def _direction(options: MaskOptions) -> Direction:
    return "protect" if options.is_subspace else options.selection.direction


def _settings(options: MaskOptions, made_from: MaskInputs) -> dict[str, Any]:
    """Settings that the result depends on, with presets and defaults filled in."""
    common: dict[str, Any] = {"preset": options.preset, "weights": options.weights, "fisher": made_from.path.name}
    if options.is_subspace:
        own: Mapping[str, Any] = {
            "svd_rank": options.svd_rank,
            "svd_energy": options.svd_energy,
            "basis": options.basis or "fisher",
            "side": options.stored_side,
            "pull": options.pull,
            "pull_per": None if options.pull is None else "course",
            "delta": options.delta,
            "activations": str(options.activations) if options.activations else None,
        }
        return common | dict(own)
    chosen = options.selection
    return common | {
        "keep": float(chosen.keep),
        "aggregate": chosen.aggregate,
        "combine": chosen.combine if chosen.aggregate != "none" else None,
        "scope": chosen.scope,
        "score": options.score,
        "against": str(options.against) if options.against else None,
        "contrast": (options.contrast or "ratio") if options.against else None,
        "seed": options.seed if options.score == "random" else None,
    }


def _report(out: Path, options: MaskOptions, masked: Masked, seconds: float) -> MaskReport:
    entries: Mapping[str, MaskEntry] = masked.entries
    weights = sum(entry.numel for entry in entries.values())
    kept = None if options.is_subspace else sum(entry.kept for entry in entries.values())
    energies = [details["energy"] for details in masked.details.values() if "energy" in details]
    return MaskReport(
        path=out,
        files=(out, fisher_sidecar.sidecar_path(out)),
        kind="subspace" if options.is_subspace else "mask",
        direction=_direction(options),
        tensors=len(entries),
        weights=weights,
        kept=kept,
        density=kept / weights if kept is not None and weights else None,
        units=masked.units,
        selected=masked.selected,
        modes=sum(details["rank"] for details in masked.details.values()) if options.is_subspace else None,
        energy=sum(energies) / len(energies) if energies else None,
        unreached=masked.unreached,
        notes=masked.notes,
        seconds=round(seconds, 3),
    )
