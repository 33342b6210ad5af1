"""Report of ``fapm``: rows per tensor, their sums, and the table of the model card."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from fisherkit.errors import CheckpointError
from fisherkit.kernels.density import DensityMap
from fisherkit.methods.merge.output import find_warnings, provenance, totals
from fisherkit.methods.merge.pair_run import Run
from fisherkit.options import FapmOptions
from fisherkit.pairs.rewrite import TensorRow


@dataclass(frozen=True, kw_only=True)
class FapmReport:
    """Report of a pruning.

    Attributes:
        path: the output; None where only a report was asked for.
        files: everything that was written.
        metric: by what entries were kept.
        density: share that was to be kept.
        tensors: by BASE's names: ``layer``, ``module``, ``weights``, ``kept``, ``zero_deltas``, ``zero_weights``,
            ``nonfinite``, ``threshold`` (the lowest score that was kept), ``energy`` (sum of d^2) and ``energy_kept``
            (the share of it that is left); ``unrelated`` where about half of the signs changed; and where FT's type
            is finer than BASE's, how many entries had ``changed``, and how many of them were ``rounded_away``.
        totals: the same over all tensors that took part.
        rules: what happened to the tensors that did not.
        warnings: what a person should know.
        provenance: checkpoints, options, versions.
        map: densities of |d| against |W| for the figure, where it was asked for.
        missing: shares of the output that other processes have still to write; the output is not there before.
    """

    path: Path | None
    files: tuple[Path, ...]
    metric: str
    density: float
    tensors: Mapping[str, TensorRow]
    totals: Mapping[str, Any]
    rules: Mapping[str, Any]
    warnings: tuple[str, ...]
    provenance: Mapping[str, Any]
    map: DensityMap | None = None
    missing: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what ``--report`` and ``--json`` write."""
        return {
            **self.provenance,
            "path": str(self.path) if self.path else None,
            "files": [str(file) for file in self.files],
            "metric": self.metric,
            "density": self.density,
            "totals": dict(self.totals),
            "tensors": dict(self.tensors),
            "rules": dict(self.rules),
            "warnings": list(self.warnings),
            **({"missing": list(self.missing)} if self.missing else {}),
        }


def make_report(
    run: Run,
    options: FapmOptions,
    share: Fraction,
    all_rows: Mapping[str, TensorRow],
    density_map: DensityMap | None = None,
) -> FapmReport:
    """Return the report of a run; its files are for the caller to name.

    Args:
        run: the pair.
        options: of the command.
        share: of entries that was to be kept.
        all_rows: by tensor; empty ones do not take part.
        density_map: for the figure.

    Raises:
        CheckpointError: nothing changed in any tensor that takes part.
    """
    rows = {name: row for name, row in all_rows.items() if row}
    if all(row["zero_deltas"] == row["weights"] for row in rows.values()):
        raise CheckpointError(
            f"{run.request.tuned}: is identical to BASE in all {len(rows)} tensors that take part; there is nothing to "
            "prune"
        )
    return _report(run, options, share, rows, density_map)


def unfinished_report(
    run: Run, options: FapmOptions, share: Fraction, rows: Mapping[str, TensorRow], missing: tuple[str, ...]
) -> FapmReport:
    """Return the report of one share of an output, of which others are missing; arguments as of make_report."""
    own = {name: row for name, row in rows.items() if row}
    return replace(_report(run, options, share, own, None), path=None, missing=missing)


def _report(
    run: Run,
    options: FapmOptions,
    share: Fraction,
    rows: Mapping[str, TensorRow],
    density_map: DensityMap | None,
) -> FapmReport:
    return FapmReport(
        path=run.request.targets.checkpoint if run.request.targets is not None else None,
        files=(),
        metric=options.metric,
        density=float(share),
        tensors=rows,
        totals=totals(rows, COUNTS),
        rules=run.chosen.facts(options.rest),
        warnings=tuple(find_warnings(rows, run.tensors)),
        provenance=provenance(run.request, run.checkpoints),
        map=density_map,
    )


COUNTS = ("weights", "kept", "zero_deltas", "zero_weights", "nonfinite")
"""Figures that are summed over tensors."""


def facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows of the table in the model card; ``report`` is as_json's."""
    found = report["totals"]
    selects = report["metric"] in ("fapm", "relative", "magnitude", "random")
    theirs = "entries that are the tuned model's" if selects else "entries that differ from the base"
    return {
        "metric": report["metric"],
        "density asked for": f"{report['density']:.6g}",
        theirs: f"{found['kept']:,} of {found['weights']:,} ({found['density']:.4%})",
        "entries that fine-tuning had not changed": f"{found['zero_deltas']:,}",
        "what is left, as a share of the squared delta": f"{found['energy_kept']:.4%}",
        "tensors pruned": f"{found['tensors']:,}",
    }
