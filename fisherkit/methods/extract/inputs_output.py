"""Output of ``extract --statistics inputs``: a file of covariances of the inputs, and its JSON; no Fisher."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisherkit.artefacts import covariance_file, fisher_sidecar
from fisherkit.checkpoint.atomic import publish, write_json
from fisherkit.checkpoint.target import check_target
from fisherkit.checkpoint.work_folder import Work
from fisherkit.engine.covariance.plan import left_out
from fisherkit.engine.covariance.writer import CovarianceWriter
from fisherkit.engine.fisher.sink import NoSink
from fisherkit.errors import OutputError, some_names
from fisherkit.methods.extract.engines import run_engine
from fisherkit.methods.extract.fit import form_of
from fisherkit.methods.extract.output import ExtractReport
from fisherkit.methods.extract.prepare import Prepared
from fisherkit.methods.extract.provenance import provenance
from fisherkit.options import ExtractOptions
from fisherkit.progress import Say, Track

_NO_FISHER = ("estimator", "loss")  # of a Fisher's provenance


class InputsOutput:
    """Covariances at ``path``; see methods.extract.output.

    Args:
        path: ``.safetensors``.
        options: of the run.

    Raises:
        OutputError: another suffix.
    """

    def __init__(self, path: Path, options: ExtractOptions) -> None:
        if path.suffix.lower() != ".safetensors":
            raise OutputError(f"{path}: covariances are written as .safetensors; give such a name with -o")
        self._options = options
        self._json = path.with_suffix(".json")
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self.written: tuple[Path, ...] = (path, self._json)

    def check_free(self) -> None:
        """Raise OutputError for what could not be made in the end, or would replace a file of another kind."""
        check_target(self.path, force=self._options.force)
        fisher_sidecar.check_owned(self._json, "file", self.path, "the facts")

    def is_of(self, run: str) -> bool:
        """Return whether the output is whole and was made by a run of this fingerprint."""
        made = fisher_sidecar.owner(self._json, "run")
        return isinstance(made, dict) and made.get("fingerprint") == run

    def fill(self, prepared: Prepared, work: Work, track: Track, say: Say, *, run: str, started: float) -> None:
        """Measure, and bring both files into the staging folder; arguments as of Output.fill."""
        form = form_of(self._options)
        with CovarianceWriter(
            prepared.skeleton, prepared.plan, self.path, work.staging, prepared.device, form, prepared.ranks
        ) as covariances:
            run_engine(prepared, work, NoSink(), covariances, track, say)
        if not prepared.ranks.is_first:
            return
        made = provenance(prepared, work.progress["mode"])
        made = {key: value for key, value in made.items() if key not in _NO_FISHER}
        made["run"] |= {"fingerprint": run, "seconds": round(time.monotonic() - started, 3)}
        without = left_out(prepared.plan, covariances.covariances)
        if without:
            say(f"{len(without):,} matrices are no linear layer's and were left out, such as {without[0]}")
        staged, rows = work.staging / self.path.name, covariances.described()
        write_json(work.staging / self._json.name, covariance_file.description(staged, made, rows, without))
        say(_cost_line(staged.stat().st_size, rows))

    def publish(self, work: Work) -> None:
        """Rename both files, the covariances last; goes on where a killed run stopped."""
        staged = work.staging / self.path.name
        if "publishing" not in work.progress:
            self.check_free()
            work.commit(publishing={"force": self._options.force})
        elif staged.exists():
            check_target(self.path, force=self._options.force or work.progress["publishing"]["force"])
        publish([(work.staging / self._json.name, self._json), (staged, self.path)])

    def report(self) -> ExtractReport:
        """Read back what lies at the final names."""
        made = json.loads(self._json.read_bytes())
        known = {key: value for key, value in made.items() if key != "moments"}
        return ExtractReport(self.path, (self.path, self._json), known, [])


def _cost_line(nbytes: int, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how large the file is, and what of the covariances its factors hold."""
    line = f"{len(rows)} covariances in {nbytes / 1e6:,.1f} MB"
    factors = {name: row["energy"] for name, row in rows.items() if row["sketch_rank"] is not None}
    if not factors:
        return line
    worst = min(factors, key=lambda name: factors[name])
    mean = sum(factors.values()) / len(factors)
    line += f"; factors hold {mean:.2%} of the energy, the least {factors[worst]:.2%} ({some_names([worst])})"
    rounding = [row["rounding"] for row in rows.values() if "rounding" in row]
    return line + (f"; bfloat16 takes {max(rounding):.2%} of their length" if rounding else "")
