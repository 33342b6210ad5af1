"""``combine``: Fishers that several runs measured, added to one, tensor by tensor.

F = sum_k w_k F_k with F_k the mean over the samples of part k, and w_k the share of its samples: the mean over all
samples, as one run would have measured it. Added in float64, a few megabytes at a time.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.artefacts import fisher_sidecar
from fisherkit.artefacts.fisher_paths import FisherPaths
from fisherkit.checkpoint.atomic import publish, write_json
from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.target import check_separate, check_target
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.checkpoint.work_folder import Work, read_progress
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.fisher.sink import figures_of, store_code
from fisherkit.errors import CheckpointError, counted
from fisherkit.kernels.stats import Histogram, TensorStats, tensor_stats
from fisherkit.methods.combine.parts import FisherPart, open_parts
from fisherkit.methods.combine.provenance import provenance
from fisherkit.options.combine import CombineOptions
from fisherkit.progress import Say, Track

_BLOCK = 1 << 20  # entries that are added at a time
_COMMIT_SECONDS = 5.0


@dataclass(frozen=True)
class CombineReport:
    """Result of ``combine``.

    Attributes:
        path: the Fisher; its sidecar and layer importance lie beside it.
        files: everything that was written.
        provenance: the sidecar without the statistics of tensors.
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
    """Add Fishers of one model, and write their mean to ``out``.

    Args:
        parts: what ``extract --shard`` wrote, in any order; or Fishers of several prompt sets, with ``weights``.
        out: ``.pt``, ``.safetensors``, or a folder.
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
    paths = FisherPaths.of(Path(out))
    given = [Path(part) for part in parts]
    check_separate((paths.fisher, *paths.described(), paths.partial), [path for path in given if path.exists()])
    opened = open_parts(given, options)
    made = provenance(opened, options)
    missing = tuple(made["combined"]["missing"])
    if missing:
        say(
            f"warning: {counted(len(missing), 'part')} missing ({', '.join(missing)}); this is the Fisher of the others"
        )
    marks = _fingerprint(opened, options)
    left = read_progress(paths.partial) if options.resume else None
    if not (left and "publishing" in left):
        paths.check_free(covariances=False, force=options.force)
    with _open_work(paths.partial, marks, options, say) as work:
        if "publishing" not in work.progress:
            started = time.monotonic()
            figures, histogram = _add_all(paths, opened, options, work, track)
            _describe(paths, opened, made, figures, histogram, seconds=time.monotonic() - started)
        _publish(paths, options, work)
        work.remove()
    return _report(FisherPaths.of(paths.fisher), missing)


def _fingerprint(parts: Sequence[FisherPart], options: CombineOptions) -> dict[str, str]:
    """What must be the same for a killed run to go on."""
    contents = [[part.made.get("content_sha256"), part.weight] for part in parts]
    return {"parts": json.dumps(contents), "options": json.dumps([options.store, options.shard_bytes])}


def _open_work(partial: Path, marks: Mapping[str, str], options: CombineOptions, say: Say) -> Work:
    if options.resume:
        work = Work.resume(partial, marks)
        if work is not None:
            say(f"going on with what is finished in {partial}")
            return work
    return Work.start(partial, marks)


def _add_all(
    paths: FisherPaths, parts: Sequence[FisherPart], options: CombineOptions, work: Work, track: Track
) -> tuple[dict[str, Any], Histogram]:
    """Write every tensor that is not written yet; return the figures of all, and their histogram."""
    shapes = {name: tuple(row["shape"]) for name, row in parts[0].made["tensors"].items()}
    specs = [TensorSpec(name, store_code(options.store), shape) for name, shape in shapes.items()]
    figures: dict[str, Any] = dict(work.progress.get("figures", {}))
    histogram = Histogram.from_json(work.progress.get("histogram", []))
    open_writer = StreamedWriter.reopen if "figures" in work.progress else StreamedWriter.create
    total = sum(spec.nbytes for spec in specs)
    done = sum(spec.nbytes for spec in specs if spec.name in figures)
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(open_index(part.path))) for part in parts]
        writer = stack.enter_context(
            open_writer(paths.fisher, specs, work=work.staging, stem="fisher", shard_bytes=options.shard_bytes)
        )
        writer.mark_written(figures)
        committed = time.monotonic()
        for spec in specs:
            if spec.name in figures:
                continue
            track("adding", done, total)
            values, stats = _add(spec.name, parts, readers, spec.torch_dtype)
            writer.write(spec.name, values)
            figures[spec.name] = figures_of(stats, spec.shape)
            histogram += stats.histogram
            done += spec.nbytes
            if time.monotonic() - committed > _COMMIT_SECONDS:
                writer.sync()
                work.commit(figures=figures, histogram=histogram.to_json())
                committed = time.monotonic()
        track("adding", total, total)
        writer.seal()
    return figures, histogram


def _add(
    name: str, parts: Sequence[FisherPart], readers: Sequence[Reader], dtype: torch.dtype
) -> tuple[Tensor, TensorStats]:
    """Return the weighted mean of one tensor, rounded once, with statistics of the values in float32.

    Raises:
        CheckpointError: a value is negative, NaN or infinite, or a tensor is missing or of another shape.
    """
    shape = tuple(parts[0].made["tensors"][name]["shape"])
    out, stats = torch.empty(shape, dtype=dtype), TensorStats()
    rows = shape[0] if shape else 1
    step = max(1, _BLOCK * rows // max(out.numel(), 1))
    for start in range(0, rows, step):
        total: Tensor | None = None
        for part, reader in zip(parts, readers, strict=True):
            info = reader.index.tensors.get(name)
            if info is None or info.shape != shape:
                raise CheckpointError(f"{part.path}: {name} is missing or has another shape; extract it anew")
            read = reader.read_rows(name, start, min(start + step, rows)) if shape else reader.read(name)
            if not bool((read.isfinite() & (read >= 0)).all()):
                raise CheckpointError(
                    f"{part.path}: {name} holds values that are no Fisher's (negative, NaN or infinite)"
                )
            weighed = read.double().mul_(part.weight)
            total = weighed if total is None else total.add_(weighed)
        assert total is not None
        summed = total.float()
        stats += tensor_stats(summed)
        if shape:
            out[start : start + step] = summed
        else:
            out.copy_(summed)
    return out, stats


def _describe(
    paths: FisherPaths,
    parts: Sequence[FisherPart],
    made: Mapping[str, Any],
    figures: Mapping[str, Any],
    histogram: Histogram,
    *,
    seconds: float,
) -> None:
    """Write the sidecar and the sums per layer into the staging folder."""
    staged = paths.staged
    tensors = sorted(staged.fisher.glob("*.safetensors")) if paths.as_folder else [staged.fisher]
    about = {
        **made,
        "file": paths.fisher.name,
        "file_bytes": sum(file.stat().st_size for file in tensors),
        "content_sha256": content_sha256(staged.fisher),
    }
    about["run"] = {**about["run"], "seconds": round(seconds, 3)}
    write_json(staged.sidecar, about | {"tensors": fisher_sidecar.placed(figures), "histogram": histogram.to_json()})
    model = str(parts[0].made["model"].get("id", ""))
    write_json(staged.importance, fisher_sidecar.layer_sums(model, paths.fisher, figures))


def _publish(paths: FisherPaths, options: CombineOptions, work: Work) -> None:
    """Rename what is staged, the Fisher last; goes on where a killed run stopped."""
    staged = paths.staged
    if "publishing" not in work.progress:
        paths.check_free(covariances=False, force=options.force)  # again: another run may have finished since
        work.commit(publishing={"force": options.force})
    elif os.path.lexists(staged.fisher):
        check_target(paths.fisher, force=options.force or work.progress["publishing"]["force"])
    if not paths.as_folder:
        publish([(staged.importance, paths.importance), (staged.sidecar, paths.sidecar)])
    publish([(staged.fisher, paths.fisher)])


def _report(paths: FisherPaths, missing: tuple[str, ...]) -> CombineReport:
    made = json.loads(paths.sidecar.read_bytes())
    beside = (paths.sidecar, paths.importance)
    tensors = sorted(set(paths.fisher.iterdir()) - set(beside)) if paths.as_folder else [paths.fisher]
    known = {key: value for key, value in made.items() if key not in ("tensors", "histogram")}
    return CombineReport(paths.fisher, (*tensors, *beside), known, missing)
