"""Tensors of several Fishers added to those of one, in float64, a few megabytes at a time, and rounded once."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fisherkit.artefacts import fisher_sidecar
from fisherkit.artefacts.fisher_paths import FisherPaths
from fisherkit.checkpoint.atomic import write_json
from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.checkpoint.work_folder import Work
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.engine.fisher.sink import figures_of, store_code
from fisherkit.errors import CheckpointError
from fisherkit.kernels.stats import Histogram, TensorStats, tensor_stats
from fisherkit.methods.combine.parts import MeasuredPart
from fisherkit.options.combine import CombineOptions
from fisherkit.progress import Track

_BLOCK = 1 << 20  # entries that are added at a time
_COMMIT_SECONDS = 5.0


def add_fishers(
    paths: FisherPaths, parts: Sequence[MeasuredPart], options: CombineOptions, work: Work, track: Track
) -> tuple[dict[str, Any], Histogram]:
    """Write every tensor that is not written yet into the staging folder.

    Args:
        paths: of the output.
        parts: what is added.
        options: of the command.
        work: notes what is finished.
        track: progress in bytes.

    Returns:
        The figures of all tensors by name, and the histogram of all entries.

    Raises:
        CheckpointError: a value that no Fisher has, or a tensor is missing or of another shape.
    """
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
    name: str, parts: Sequence[MeasuredPart], readers: Sequence[Reader], dtype: torch.dtype
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


def describe(
    paths: FisherPaths,
    parts: Sequence[MeasuredPart],
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
