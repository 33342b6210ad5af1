"""``combine``: what several runs measured, added to one: Fishers with what lies beside them, or covariances of inputs.

F = sum_k w_k F_k with F_k the mean over the samples of part k, and w_k the share of its samples: the mean over all
samples, as one run would have measured it. Covariances are means over tokens, and weighed by these.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fisherkit.artefacts import fisher_sidecar
from fisherkit.artefacts.covariance_file import is_covariances, path_beside
from fisherkit.artefacts.fisher_paths import FisherPaths, publish_fisher
from fisherkit.checkpoint.atomic import publish, write_json
from fisherkit.checkpoint.target import check_separate, check_target
from fisherkit.checkpoint.work_folder import Work, may_replace, read_progress
from fisherkit.errors import OutputError, counted
from fisherkit.methods.combine.covariances import add_covariances
from fisherkit.methods.combine.fisher_sum import add_fishers, describe
from fisherkit.methods.combine.parts import MeasuredPart, open_parts
from fisherkit.methods.combine.provenance import provenance
from fisherkit.options.combine import CombineOptions
from fisherkit.progress import Say, Track


@dataclass(frozen=True)
class CombineReport:
    """Result of ``combine``.

    Attributes:
        path: the Fisher; its sidecar, layer importance and covariances lie beside it. Or covariances of inputs.
        files: everything that was written.
        provenance: the JSON beside it without the statistics of tensors.
        missing: parts that were not there, such as ``3/16``.
    """

    path: Path
    files: tuple[Path, ...]
    provenance: Mapping[str, Any]
    missing: tuple[str, ...]


def combine(
    parts: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: CombineOptions | None = None,
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> CombineReport:
    """Add what several runs measured on one model, and write the mean to ``out``.

    Args:
        parts: what ``extract --shard`` wrote, in any order; or Fishers of several prompt sets, with ``weights``.
            Covariances that lie beside all of them are added too; files of ``--statistics inputs`` are added alone.
        out: ``.pt``, ``.safetensors``, or a folder; ``.safetensors`` for covariances of inputs.
        options: see CombineOptions.
        track: progress, called with stage, done and total.
        say: gets the lines meant for a person.

    Raises:
        CheckpointError: parts that cannot be read, do not belong together, or are missing or there twice.
        OptionError: weights that do not fit.
        OutputError: the output exists, is an input, or cannot be written.
        ResumeError: the work folder belongs to another run.
    """
    options = options or CombineOptions()
    out, given = Path(out), [Path(part) for part in parts]
    paths = FisherPaths.of(out)
    if may_replace(paths.partial, resume=options.resume):
        options = replace(options, force=True)
    check_separate((out, *paths.described(), paths.partial), [path for path in given if path.exists()])
    opened = open_parts(given, options)
    made = provenance(opened, options)
    missing = tuple(made["combined"]["missing"])
    if missing:
        line = f"{counted(len(missing), 'part')} missing ({', '.join(missing)})"
        say(f"warning: {line}; this is the mean over the others")
    run = _Run(opened, options, made, missing, track, say)
    return _combine_inputs(out, run) if is_covariances(opened[0].made) else _combine_fishers(paths, run)


@dataclass(frozen=True)
class _Run:
    parts: tuple[MeasuredPart, ...]
    options: CombineOptions
    made: Mapping[str, Any]
    missing: tuple[str, ...]
    track: Track
    say: Say

    def weights(self) -> list[float] | None:
        """Weights of covariances: the caller's; None for tokens."""
        return [part.weight for part in self.parts] if self.options.weights is not None else None

    def open_work(self, partial: Path, check_free: Callable[[], None]) -> Work:
        """Go on with a killed run where that is asked for, or start afresh."""
        contents = [[part.made.get("content_sha256"), part.weight] for part in self.parts]
        settings = json.dumps([self.options.store, self.options.shard_bytes])
        marks = {"parts": json.dumps(contents), "options": settings}
        left = read_progress(partial) if self.options.resume else None
        if not (left and "publishing" in left):
            check_free()
        work = Work.resume(partial, marks, may_replace=self.options.force) if self.options.resume else None
        if work is not None:
            self.say(f"going on with what is finished in {partial}")
        return work or Work.start(partial, marks, may_replace=self.options.force)


def _combine_fishers(paths: FisherPaths, run: _Run) -> CombineReport:
    beside = [path_beside(part.path) for part in run.parts]
    there = [path for path in beside if path.exists()]
    has_covariances = len(there) == len(beside)
    if there and not has_covariances:
        run.say(f"warning: covariances lie beside {len(there)} of {len(beside)} parts, and are left out")

    def check_free() -> None:
        paths.check_free(covariances=has_covariances, force=run.options.force)

    with run.open_work(paths.partial, check_free) as work:
        if "publishing" not in work.progress:
            started = time.monotonic()
            figures, histogram = add_fishers(paths, run.parts, run.options, work, run.track)
            if has_covariances:
                target = paths.fisher.with_name(paths.covariances.name)
                about = add_covariances(beside, run.weights(), target, work, run.made, run.track)
                write_json(paths.staged.covariances_json, about)
            describe(paths, run.parts, run.made, figures, histogram, seconds=time.monotonic() - started)
        publish_fisher(paths.fisher, work, covariances=has_covariances, force=run.options.force)
        work.remove()
    paths = FisherPaths.of(paths.fisher)
    side_files = [paths.sidecar, paths.importance]
    if has_covariances:
        side_files += [paths.covariances, paths.covariances_json]
    tensors = sorted(set(paths.fisher.iterdir()) - set(side_files)) if paths.as_folder else [paths.fisher]
    return _report(paths.fisher, (*tensors, *side_files), paths.sidecar, run.missing)


def _combine_inputs(out: Path, run: _Run) -> CombineReport:
    beside = out.with_suffix(".json")
    if out.suffix.lower() != ".safetensors":
        raise OutputError(f"{out}: covariances are written as .safetensors; give such a name with -o")

    def check_free() -> None:
        check_target(out, force=run.options.force)
        fisher_sidecar.check_owned(beside, "file", out, "the facts")

    with run.open_work(out.with_name(f"{out.name}.partial"), check_free) as work:
        staged = work.staging
        if "publishing" not in work.progress:
            files = [part.path for part in run.parts]
            about = add_covariances(files, run.weights(), out, work, run.made, run.track)
            write_json(staged / beside.name, about)
            check_free()  # again: another run may have finished since
            work.commit(publishing={"force": run.options.force})
        elif (staged / out.name).exists():
            check_target(out, force=run.options.force or work.progress["publishing"]["force"])
        publish([(staged / beside.name, beside), (staged / out.name, out)])
        work.remove()
    return _report(out, (out, beside), beside, run.missing)


def _report(path: Path, files: tuple[Path, ...], beside: Path, missing: tuple[str, ...]) -> CombineReport:
    made = json.loads(beside.read_bytes())
    known = {key: value for key, value in made.items() if key not in ("tensors", "histogram", "moments")}
    return CombineReport(path, files, known, missing)
