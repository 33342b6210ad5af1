"""What ``fapm`` reports: rows per tensor, their sums, and the table of the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherkit.kernels.density import DensityMap
from fisherkit.pairs.rewrite import Row


@dataclass(frozen=True, kw_only=True)
class FapmReport:
    """What ``fapm`` did.

    Attributes:
        path: the output; None where only a report was asked for.
        files: everything that was written.
        metric: by what entries were kept.
        density: share that was to be kept.
        tensors: by BASE's names: ``layer``, ``module``, ``weights``, ``kept``, ``zero_deltas``, ``zero_weights``,
            ``nonfinite``, ``threshold`` (the lowest score that was kept), ``energy`` (sum of d^2) and ``energy_kept``
            (the share of it that is left), and ``unrelated`` where about half of the signs changed.
        totals: the same over all tensors that took part.
        rules: what happened to the tensors that did not.
        warnings: what a person should know.
        provenance: sides, options, versions.
        map: densities of |d| against |W| for the figure, where it was asked for.
    """

    path: Path | None
    files: tuple[Path, ...]
    metric: str
    density: float
    tensors: Mapping[str, Row]
    totals: Mapping[str, Any]
    rules: Mapping[str, Any]
    warnings: tuple[str, ...]
    provenance: Mapping[str, Any]
    map: DensityMap | None = None

    def as_json(self) -> dict[str, Any]:
        """For ``--report`` and ``--json``."""
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
        }


COUNTS = ("weights", "kept", "zero_deltas", "zero_weights", "nonfinite")
"""What is summed over tensors."""


def facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the table in the model card."""
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
