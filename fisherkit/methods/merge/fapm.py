"""FAPM: keep the part of a fine-tune that does not cost the base (arXiv 2509.08255), and the controls beside it.

Per tensor, in float32: d = W_ft - W, m = mean|W|, S = |d| (1 - m/|W|); the entries with the highest S are FT's, all
others BASE's, bit for bit. Nothing is rescaled. Unlike the authors' script, which adds bf16 differences and lets
undefined scores (0/0) win, entries that did not change and entries that are zero in the base score -inf, and the quota
is exact: ``floor((1 - sparsity) n)``, ties going to the lower index.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from fisherkit.artefacts.sparse_delta import SparseWriter, check_sidecar, sidecar_of
from fisherkit.checkpoint.target import check_apart, check_target
from fisherkit.checkpoint.work_folder import Work
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.floats import Stored
from fisherkit.kernels.density import DensityMap
from fisherkit.kernels.prune import SAMPLE_STREAM, TensorPair, block_scores, converted, sample_indices
from fisherkit.kernels.prune_scores import Scratch
from fisherkit.kernels.top_k import SAMPLE, quota
from fisherkit.methods.merge.fapm_report import COUNTS, FapmReport, facts
from fisherkit.methods.merge.pair_run import Request, Run, provenance, totals
from fisherkit.methods.merge.quotas import Quotas, random_stream
from fisherkit.options import FapmOptions, exact_share
from fisherkit.pairs.prune import Outcome, Pruning
from fisherkit.pairs.rewrite import Row, work_folder
from fisherkit.progress import Say, Track

DEFAULT_SPARSITY = 0.9
ADAPTER_SPARSITY = 0.1
"""A low-rank delta is spread over all entries: dropping most of it leaves nothing that was learnt."""


def fapm(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None,
    options: FapmOptions | None = None,
    *,
    sparse: str | Path | None = None,
    figure: bool = False,
    command: Sequence[str] | None = None,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> FapmReport:
    """Prune a fine-tuned delta and write a whole checkpoint, a sparse delta, or both.

    Args:
        base: the model that was fine-tuned: folder, file, ``org/name`` or ``org/name@revision``.
        tuned: the fine-tuned model, or a PEFT adapter's folder.
        out: folder to make; None writes no checkpoint.
        options: see FapmOptions.
        sparse: also write the kept entries alone (see checkpoint.sparse).
        figure: gather what the figure needs.
        command: the command line, for the model card.
        track: progress, called with stage, done and total.
        say: gets remarks for people.

    Raises:
        CheckpointError: the sides cannot be read, do not belong together, or are identical.
        OptionError: options that contradict each other.
        OutputError: the output exists, is one of the inputs, or cannot be written.
        ResumeError: the work folder belongs to another run.
    """
    options = options or FapmOptions()
    target = Path(out) if out is not None else None
    sparse = Path(sparse) if sparse is not None else None
    if sparse is not None:
        if options.resume:
            say("note: a sparse delta is not gone on with; starting over")
            options = replace(options, resume=False, force=options.force or work_folder(sparse).is_dir())
        _check_sparse(sparse, options)
        check_apart((sparse, sidecar_of(sparse)), (Path(base), Path(tuned)), target)
    request = Request("fapm", str(base), str(tuned), target, options, command, track, say)
    with Run(request) as run:
        return _Fapm(run, options, list_kept=sparse is not None, figure=figure).run(sparse)


def sweep_fapm(
    base: str | Path,
    tuned: str | Path,
    sparsities: Sequence[float],
    options: FapmOptions | None = None,
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> list[FapmReport]:
    """What ``fapm`` would keep at several sparsities, both sides being read once (per pass, where scopes are shared).

    Raises:
        CheckpointError, OptionError: as for fapm.
    """
    options = options or FapmOptions()
    if not options.selects:
        raise OptionError(f"--sweep is for metrics that select, not {options.metric}")
    with Run(Request("fapm", str(base), str(tuned), None, options, None, track, say)) as run:
        return _Fapm(run, options).sweep([1 - exact_share(sparsity) for sparsity in sparsities])


def plan_fapm(
    base: str | Path, tuned: str | Path, options: FapmOptions | None = None, *, say: Say = lambda line: None
) -> dict[str, Any]:
    """What ``fapm`` would do: tensors, sizes, memory, and the time it would take on warm files, tried on a part.

    Raises:
        CheckpointError, OptionError: as for fapm.
    """
    options = options or FapmOptions()
    with Run(Request("fapm", str(base), str(tuned), None, options, None, lambda *_: None, say)) as run:
        return _Fapm(run, options).plan()


def _check_sparse(sparse: Path, options: FapmOptions) -> None:
    if not options.selects:
        raise OptionError(f"--sparse is for metrics that select; {options.metric} changes every entry")
    if sparse.suffix != ".safetensors":
        raise OptionError(f"--sparse {sparse}: a sparse delta ends in .safetensors")
    check_target(sparse, force=options.force)
    check_sidecar(sparse)


class _Fapm:
    """One run: quotas, thresholds, tensors, totals."""

    def __init__(self, run: Run, options: FapmOptions, *, list_kept: bool = False, figure: bool = False) -> None:
        self._run = run
        self._options = options
        adapter = run.pair.tuned.kind == "adapter"
        self._share = options.kept_share(ADAPTER_SPARSITY if adapter else DEFAULT_SPARSITY)
        if adapter and self._share < Fraction(1, 2):
            run.request.say(
                f"note: FT is an adapter; a low-rank delta does not bear {float(1 - self._share):.0%} sparsity "
                f"(default for adapters: {ADAPTER_SPARSITY:.0%})"
            )
        self._pruning = Pruning(run.tensors.team, options.seed, write=run.request.out is not None, list_kept=list_kept)
        self._map = DensityMap() if figure else None
        self._quotas = Quotas(run, options)
        self._sparse: SparseWriter | None = None

    # The three things it can do

    def run(self, sparse: Path | None) -> FapmReport:
        if sparse is None:
            return self._write(())
        with Work.start(work_folder(sparse), {"sparse": sparse.name}) as held:
            try:
                with contextlib.closing(SparseWriter(held.folder)) as writer:
                    report = self._write_both(sparse, writer)
            except Exception:
                held.remove()  # it is no use to a later run
                raise
            held.remove()
        return report

    def _write_both(self, sparse: Path, writer: SparseWriter) -> FapmReport:
        self._sparse = writer
        report = self._write((sparse, sidecar_of(sparse)))
        about = {
            "base": report.provenance["base"]["id"],
            "base_fingerprint": self._run.pair.base.index.fingerprint(),
        }
        writer.finish(sparse, about | {"made": dict(report.provenance)}, force=self._options.force)
        return report

    def sweep(self, shares: Sequence[Fraction]) -> list[FapmReport]:
        self._quotas.survey(shares)
        rows: list[dict[str, Row]] = [{} for _ in shares]
        for at, name in enumerate(self._walk("sweeping")):
            sides = self._sides(name)
            for number, share in enumerate(shares):
                outcome = self._prune(name, lambda sides=sides: sides, share, number)[1]  # type: ignore[misc]
                self._run.check_finite(name, outcome.nonfinite)
                rows[number][name] = self._placed(name, outcome)
            self._run.request.track("sweeping", at + 1, len(self._run.chosen.names))
        self._refuse_identical(rows[0])
        self._run.say_warnings()
        return [self._report(row, float(share), ()) for row, share in zip(rows, shares, strict=True)]

    def plan(self) -> dict[str, Any]:
        infos = [self._run.tensors.info(name) for name in self._run.pair.base.index.tensors]
        chosen = [self._run.tensors.info(name) for name in self._run.chosen.names]
        weights = sum(info.numel for info in chosen)
        largest = max(info.nbytes for info in infos)
        wide = 4 * max(info.numel for info in chosen)  # float32
        more = 3 * wide if self._run.pair.tuned.kind == "adapter" else 0
        return {
            "base": self._run.request.base,
            "tuned": self._run.request.tuned,
            "kind": self._run.pair.tuned.kind,
            "metric": self._options.metric,
            "scope": self._options.scope,
            "density": float(self._share),
            "tensors": len(chosen),
            "weights": weights,
            "kept_at_most": sum(quota(self._share, count) for count in self._quotas.group_sizes().values()),
            "left_alone": len(infos) - len(chosen),
            "output_bytes": sum(info.nbytes for info in infos),
            "peak_bytes": 2 * largest + more + self._run.tensors.team.threads * 5_000_000 + 60_000_000,
            "seconds_warm": self._try_out(weights),
        }

    def _try_out(self, weights: int) -> float:
        """Seconds for all tensors, from those that fit into one."""
        started, done = time.monotonic(), 0
        pruning, self._pruning = self._pruning, Pruning(self._run.tensors.team, write=False)
        for name in self._run.chosen.names:
            info = self._run.tensors.info(name)
            if self._options.selects:
                self._pruning.by_quota(lambda name=name: self._sides(name), quota(self._share, info.numel), 0)  # type: ignore[misc]
            else:
                self._prune(name, lambda name=name: self._sides(name), self._share, 0)  # type: ignore[misc]
            done += info.numel
            if time.monotonic() - started > 1:
                break
        self._pruning = pruning
        passes = 1 if self._options.scope == "tensor" else 3
        return round(1.3 * passes * (time.monotonic() - started) * weights / max(done, 1), 1)

    # Tensors

    def _write(self, extra: tuple[Path, ...]) -> FapmReport:
        run = self._run
        self._quotas.survey([self._share])
        if run.request.out is None:
            rows = {}
            names = self._listed()
            for at, name in enumerate(run.tensors.walk(names)):
                run.request.track("pruning", at, len(names))
                rows[name] = self._change(name)[1]
            run.request.track("pruning", len(names), len(names))
            self._refuse_identical(rows)
            self._run.say_warnings()
            return self._report(rows, float(self._share), extra)
        settings = {**provenance(run)["options"], "sparsity": str(1 - self._share), "names": run.chosen.names}
        del settings["density"]  # says the same

        def report(rows: Mapping[str, Row]) -> dict[str, Any]:
            self._made = self._report(self._refuse_identical(rows), float(self._share), ())
            return self._made.as_json()

        files, _ = run.write(self._change, settings, report, facts, self._quotas.recall)
        return replace(self._made, files=(*files, *extra))

    def _walk(self, stage: str) -> Any:
        self._run.request.track(stage, 0, len(self._run.chosen.names))
        return self._run.tensors.walk(self._run.chosen.names)

    def _change(self, name: str) -> tuple[Stored, Row]:
        """The tensor as the output should have it, and its row."""
        data = self._run.untouched(name)
        if data is not None:
            self._list_changed(name, data)
            return data, {}
        sides, outcome = self._prune(name, lambda: self._sampled(name), self._share, 0)
        self._run.check_finite(name, outcome.nonfinite, sides.base)
        if outcome.rounded_away:
            self._run.note_rounding(name, outcome.kept + outcome.rounded_away, outcome.rounded_away)
        if self._sparse is not None and outcome.indices is not None:
            info = self._run.tensors.info(name)
            kept = converted(sides.tuned[outcome.indices], sides.tuned_code, sides.base_code)
            self._sparse.add(name, info.numel, info.dtype, outcome.indices, kept)
        self._add_to_map(name, outcome.threshold)
        return sides.base, self._placed(name, outcome)

    def _listed(self) -> list[str]:
        """The tensors to look at where no checkpoint is written: a sparse delta also has those that are FT's anyway."""
        run = self._run
        listed = {*run.chosen.names, *(run.chosen.rest if self._sparse and self._options.rest == "tuned" else ())}
        return [name for name in run.pair.base.index.tensors if name in listed]

    def _list_changed(self, name: str, data: Stored) -> None:
        """Put into the sparse delta what a tensor that does not take part has of FT."""
        if self._sparse is not None and name in self._run.chosen.rest and self._options.rest == "tuned":
            info, bits, taken = self._run.tensors.info(name), np.dtype(f"u{data.itemsize}"), data.copy()
            indices = np.flatnonzero(taken.view(bits) != self._run.tensors.base(name).view(bits))
            data[:] = taken  # the buffer into which BASE was read
            self._sparse.add(name, info.numel, info.dtype, indices, taken[indices])

    def _sides(self, name: str) -> TensorPair:
        mean = self._quotas.means.get(name)
        return self._run.sides(name, self._options.metric, mean, selects=self._options.selects)

    def _sampled(self, name: str) -> TensorPair:
        """Both sides, of which a sample is put aside for the figure."""
        sides = self._sides(name)
        if self._map is not None:
            self._sample = sides.take(sample_indices(sides.base.size, SAMPLE >> 1, 0, random_stream(self._run, name)))
        return sides

    def _add_to_map(self, name: str, threshold: float | None) -> None:
        if self._map is not None:
            stream, scores = random_stream(self._run, name), None
            if self._options.selects:
                scores = block_scores(
                    self._sample, Scratch(self._sample.base.size), self._options.seed, stream, SAMPLE_STREAM
                )
            self._map.add(name, self._sample, self._run.tensors.info(name).numel, threshold, scores)

    def _prune(
        self, name: str, load: Callable[[], TensorPair], share: Fraction, number: int
    ) -> tuple[TensorPair, Outcome]:
        if self._options.selects:
            return self._quotas.prune(self._pruning, name, load, share, number)
        shape = self._run.tensors.info(name).shape
        columns = shape[-1] if len(shape) > 1 else math.prod(shape)
        return self._pruning.rescaled(load(), float(share), max(columns, 1), random_stream(self._run, name))

    # Reports

    def _placed(self, name: str, outcome: Outcome) -> Row:
        place, info = self._run.chosen.places[name], self._run.tensors.info(name)
        where = {"layer": place.layer, "module": place.module, "shape": list(info.shape), "weights": info.numel}
        ties = {} if self._options.scope == "tensor" else {"ties": outcome.ties}
        return where | outcome.row() | ties | self._run.remark(name)

    def _pruned(self, rows: Mapping[str, Row]) -> dict[str, Row]:
        return {name: row for name, row in rows.items() if row}

    def _refuse_identical(self, rows: Mapping[str, Row]) -> Mapping[str, Row]:
        if all(row["zero_deltas"] == row["weights"] for row in rows.values() if row):
            raise CheckpointError(
                f"{self._run.request.tuned}: is identical to BASE in all {len(self._pruned(rows))} tensors that take "
                "part; there is nothing to prune"
            )
        return rows

    def _report(self, rows: Mapping[str, Row], density: float, files: tuple[Path, ...]) -> FapmReport:
        run, rows = self._run, self._pruned(rows)
        if self._map is not None:
            self._map.metric = self._options.metric
            for name in rows.keys() - self._map.names:  # pruned by the run that this one goes on with
                self._sampled(name)
                self._add_to_map(name, rows[name]["threshold"])
        return FapmReport(
            path=run.request.out,
            files=files,
            metric=self._options.metric,
            density=density,
            tensors=rows,
            totals=totals(rows, COUNTS),
            rules=run.chosen.facts(self._options.rest),
            warnings=tuple(run.all_warnings()),
            provenance=provenance(run),
            map=self._map,
        )
