"""merge: a fine-tuned delta put onto its base as far as a mask, a subspace, the layers' importance and a factor allow.

The four act in this order: ``mask`` (FT's entries only where it allows change), ``subspace`` (nothing of the delta in
protected directions; of a soft subspace, what one step of its pull leaves), ``layer_scale`` (the more Fisher in a
layer, the gentler), ``alpha``. None of them given, it is the interpolation ``(1 - alpha) base + alpha FT`` of Wise-FT
(arXiv 2109.01903). No mask is promised to protect.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fisherkit.artefacts.layer_importance import layer_scales, read_importance
from fisherkit.artefacts.mask_file import MaskFile, open_mask
from fisherkit.checkpoint.names.axes import AxisFinder
from fisherkit.checkpoint.names.spelling import spelling
from fisherkit.checkpoint.target import check_apart
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.floats import Floats, Stored
from fisherkit.kernels.pull import pull_strengths, pulled_share
from fisherkit.methods.merge.pair_run import Request, Run, provenance, totals
from fisherkit.options import MergeOptions, Side
from fisherkit.pairs.blend import Treatment, blend
from fisherkit.pairs.rewrite import Row
from fisherkit.progress import Say, Track


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What ``merge`` did.

    Attributes:
        path: the output.
        files: everything that was written.
        tensors: by BASE's names: ``layer``, ``module``, ``weights``, ``kept`` (entries that differ from BASE's),
            ``zero_deltas``, ``nonfinite``, ``scale``, ``energy`` (sum of d^2) and ``energy_kept`` (the share left), and
            ``unrelated`` where about half of the signs changed.
        totals: the same over all tensors that took part.
        rules: what happened to the tensors that did not.
        warnings: what a person should know.
        provenance: sides, options, versions.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Row]
    totals: Mapping[str, Any]
    rules: Mapping[str, Any]
    warnings: tuple[str, ...]
    provenance: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """For ``--report`` and ``--json``."""
        return {
            **self.provenance,
            "path": str(self.path),
            "files": [str(file) for file in self.files],
            "totals": dict(self.totals),
            "tensors": dict(self.tensors),
            "rules": dict(self.rules),
            "warnings": list(self.warnings),
        }


def merge(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    command: Sequence[str] | None = None,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> MergeReport:
    """Write BASE with as much of FT's delta as the options allow.

    Args:
        base: the model that was fine-tuned: folder, file, ``org/name`` or ``org/name@revision``.
        tuned: the fine-tuned model, a PEFT adapter's folder, or a sparse delta that fapm wrote.
        out: folder to make.
        options: see MergeOptions.
        command: the command line, for the model card.
        track: progress, called with stage, done and total.
        say: gets remarks for people.

    Raises:
        CheckpointError: the sides, the mask or the subspace cannot be read or do not belong together.
        OptionError: options outside their range.
        OutputError: the output exists, is one of the inputs, or cannot be written.
        ResumeError: the work folder belongs to another run.
    """
    options = options or MergeOptions()
    inputs = [path for path in (options.mask, options.subspace, options.layer_scale) if path is not None]
    check_apart((Path(out),), inputs, None)
    request = Request("merge", str(base), str(tuned), Path(out), options, command, track, say)
    with Run(request) as run, _Merge(run, options) as job:
        return job.run()


class _Merge:
    """One run: what is done to each tensor, and the report."""

    def __init__(self, run: Run, options: MergeOptions) -> None:
        self._run = run
        self._options = options
        self._stack = ExitStack()
        self._made: MergeReport | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._masks = self._by_tensor(stack, self._options.mask, "mask")
            self._modes = self._by_tensor(stack, self._options.subspace, "subspace")
            self._scales = self._layer_scales()
            tensors = self._run.pair.base.index.tensors
            self._axes = AxisFinder({name: info.shape for name, info in tensors.items()})
            self._check_sides()
            self._say_unmasked()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def run(self) -> MergeReport:
        def report(rows: Mapping[str, Row]) -> dict[str, Any]:
            self._made = self._report(rows)
            return self._made.as_json()

        settings = {**provenance(self._run)["options"], "inputs": self._input_marks(), "names": self._run.chosen.names}
        files, _ = self._run.write(self._change, settings, report, _facts)
        assert self._made is not None, "write makes the report before it returns"
        return replace(self._made, files=files)

    def _by_tensor(self, stack: ExitStack, path: Path | None, kind: str) -> dict[str, tuple[MaskFile, str]]:
        """By BASE's tensor names, the file and the name in it."""
        if path is None:
            return {}
        file = stack.enter_context(open_mask(path))
        if file.kind != kind:
            raise CheckpointError(f"{path}: is a {file.kind}; give it as --{file.kind}")
        ours = {spelling(name): name for name in self._run.pair.base.index.tensors}
        missing = [name for name in file.names if spelling(name) not in ours]
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of its {len(file.names)} weights are not in {self._run.request.base}, such as "
                f"{missing[0]!r}; it was made for another model, or another layout of its experts"
            )
        found = {ours[spelling(name)]: (file, name) for name in file.names}
        for pair in self._run.pair.tuned.tied_pairs.items():  # a head and the embedding that both sides tie it to
            for one, other in (pair, pair[::-1]):
                if one in found:
                    found.setdefault(other, found[one])
        return found

    def _layer_scales(self) -> dict[int, float]:
        if self._options.layer_scale is None:
            return {}
        scales = layer_scales(
            read_importance(self._options.layer_scale), power=self._options.power, floor=self._options.floor
        )
        layers = {place.layer for place in self._run.chosen.places.values() if place.layer is not None}
        if scales.keys() != layers:
            raise CheckpointError(
                f"{self._options.layer_scale}: is about {len(scales)} layers, and BASE has {len(layers)}; measure the "
                "Fisher of this model"
            )
        return scales

    def _input_marks(self) -> list[str]:
        """What tells one mask from another, for --resume."""
        paths = [path for path in (self._options.mask, self._options.subspace, self._options.layer_scale) if path]
        return [f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]

    def _change(self, name: str) -> tuple[Stored, Row]:
        data = self._run.untouched(name)
        if data is None and self._options.mask is not None and name not in self._masks and self._options.rest == "base":
            data = self._run.tensors.base(name)
        if data is not None:
            return data, {}
        info, place = self._run.tensors.info(name), self._run.chosen.places[name]
        treatment = self._treatment(name, info.shape)
        plain = treatment.scale == 1 and treatment.u is None and treatment.v is None
        sides = self._run.sides(name, selects=plain)
        found = blend(sides, info.shape, treatment, self._run.tensors.team)
        self._run.check_finite(name, found.nonfinite, sides.base)
        if found.rounded_away:
            self._run.note_rounding(name, found.kept + found.rounded_away, found.rounded_away)
        row = {
            "layer": place.layer,
            "module": place.module,
            "shape": list(info.shape),
            "weights": info.numel,
            "kept": found.kept,
            "zero_deltas": found.zero_deltas,
            "nonfinite": found.nonfinite,
            "scale": treatment.scale,
            "energy": found.energy,
            "energy_kept": found.energy_kept / found.energy if found.energy else 0.0,
            **self._run.remark(name),
        }
        return sides.base, row

    def _treatment(self, name: str, shape: tuple[int, ...]) -> Treatment:
        layer = self._run.chosen.places[name].layer
        scale = self._options.alpha * (1.0 if layer is None else self._scales.get(layer, 1.0))
        mask = u = v = None
        if name in self._masks:
            file, own = self._masks[name]
            mask = file.read(own, shape)
        if name in self._modes:
            file, own = self._modes[name]
            modes = file.modes(own, shape)
            of_u, of_v = self._sides(name)
            u = modes.u if self._options.side in ("both", of_u) else None
            v = modes.v if self._options.side in ("both", of_v) else None
            if file.pull is not None and modes.s is not None:
                u, v = (_softened(side, modes.s, file.pull) for side in (u, v))
        return Treatment(mask, u, v, scale)

    def _check_sides(self) -> None:
        """Refuse a side of which the subspace has no directions, before anything is written."""
        for name, (file, own) in self._modes.items():
            known = zip(self._sides(name), file.has_sides(own), strict=True)
            if not any(held and self._options.side in ("both", side) for side, held in known):
                raise OptionError(
                    f"--side {self._options.side}: {file.path} has no directions of that side for {own!r}"
                )

    def _unmasked(self) -> list[str]:
        """Tensors that take part, and that the mask does not speak of."""
        names = self._run.chosen.names if self._options.mask is not None else ()
        return [name for name in names if name not in self._masks]

    def _say_unmasked(self) -> None:
        """Tell what a mask does not speak of."""
        free = self._unmasked()
        if free and self._options.rest == "tuned":
            entries = sum(self._run.tensors.info(name).numel for name in free)
            self._run.request.say(
                f"note: {len(free)} tensors ({entries:,} entries, such as {free[0]!r}) are not in the mask and become "
                "FT's; --rest base keeps BASE's"
            )

    def _sides(self, name: str) -> tuple[Side, Side]:
        """What U and V are of: outputs and inputs, or the other way round where the weight is stored so (Conv1D)."""
        axes = self._axes.axes(name)
        return ("left", "right") if axes is None or axes.output < axes.input else ("right", "left")

    def _report(self, rows: Mapping[str, Row]) -> MergeReport:
        run = self._run
        rows = {name: row for name, row in rows.items() if row}
        if all(row["zero_deltas"] == row["weights"] for row in rows.values()):
            raise CheckpointError(
                f"{run.request.tuned}: is identical to BASE where it takes part; there is nothing to merge"
            )
        assert run.request.out is not None, "merge always writes"
        return MergeReport(
            path=run.request.out,
            files=(),
            tensors=rows,
            totals=totals(rows, ("weights", "kept", "zero_deltas", "nonfinite")),
            rules={**run.chosen.facts(self._options.rest), "not_in_mask": self._unmasked()},
            warnings=tuple(run.all_warnings()),
            provenance=provenance(run),
        )


def _softened(directions: Floats | None, spectrum: Floats, pull: float) -> Floats | None:
    """Directions q_j times the root of the share p_j that is taken: what is removed is then sum_j p_j (D q_j) q_j^T."""
    if directions is None:
        return None
    share = pulled_share(pull_strengths(pull, spectrum, directions.shape[-2]))
    return directions * np.sqrt(share)[..., None, :]


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the table in the model card."""
    options, found = report["options"], report["totals"]
    given = {"mask": ("mask",), "subspace": ("subspace", "side"), "layer_scale": ("layer_scale", "power", "floor")}
    keys = [key for option, own in given.items() if options[option] is not None for key in own]
    shown = {key.replace("_", " "): str(options[key]) for key in (*keys, "alpha")}
    return shown | {
        "entries that differ from the base": f"{found['kept']:,} of {found['weights']:,} ({found['density']:.4%})",
        "share of the squared delta that is left": f"{found['energy_kept']:.4%}",
    }
