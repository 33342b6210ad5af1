"""Covariances of several parts added to those of all, one at a time: E = sum_k t_k E_k / sum_k t_k.

E_k is a mean over t_k tokens, so that this is the mean over the tokens of all parts. Where Fishers of several prompt
sets are added by weights of the caller, those take the place of t_k.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherkit.artefacts.covariance_file import CovarianceFile, description
from fisherkit.checkpoint.work_folder import Work
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.errors import CheckpointError
from fisherkit.floats import Floats
from fisherkit.kernels.covariance_sum import Doubles, sum_of_factors, sum_of_wholes
from fisherkit.methods.combine.parts import shapes_of
from fisherkit.progress import Track

_COMMIT_SECONDS = 5.0
Row = Mapping[str, Any]


def add_covariances(
    files: Sequence[Path], weights: Sequence[float] | None, target: Path, work: Work, made: Row, track: Track
) -> dict[str, Any]:
    """Write the sums into the staging folder, and return the JSON that belongs beside them.

    Args:
        files: of each part, with a JSON beside it.
        weights: of each part; None for its tokens.
        target: where the file will lie.
        work: notes under ``moments`` what is finished.
        made: where the sum comes from.
        track: progress in covariances.

    Raises:
        CheckpointError: a file cannot be read, or holds other covariances than the first.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(CovarianceFile(path)) for path in files]
        for file in opened:
            if shapes_of(file.rows) != shapes_of(opened[0].rows):
                raise CheckpointError(f"{file.path}: holds other covariances than {opened[0].path}")
        rows = opened[0].rows
        specs = [_spec(name, row) for name, row in rows.items()]
        done: dict[str, Row] = dict(work.progress.get("moments", {}))
        open_writer = StreamedWriter.reopen if "moments" in work.progress else StreamedWriter.create
        writer = stack.enter_context(open_writer(target, specs, work=work.staging))
        writer.mark_written(done)
        committed = time.monotonic()
        for number, (name, row) in enumerate(rows.items()):
            track("adding covariances", number, len(rows))
            if name in done:
                continue
            own = [file.rows[name] for file in opened]
            total, figures = _add(name, opened, _shares(own, weights))
            writer.write(name, torch.from_numpy(total.astype(np.float32)))
            done[name] = {**row, **figures, "tokens": sum(one.get("tokens", 0) for one in own)}
            if time.monotonic() - committed > _COMMIT_SECONDS:
                writer.sync()
                work.commit(moments=done)
                committed = time.monotonic()
        track("adding covariances", len(rows), len(rows))
        writer.seal()
        return description(work.staging / target.name, made, {name: done[name] for name in rows}, opened[0].left_out)


def _spec(name: str, row: Row) -> TensorSpec:
    size, rank = row["size"], row["sketch_rank"]
    shape = (size * (size + 1) // 2,) if rank is None else (size, rank)
    return TensorSpec(name, row.get("dtype", "F32"), shape)


def _shares(rows: Sequence[Row], weights: Sequence[float] | None) -> list[float]:
    """Return what each part counts for, all together 1; parts without a token (an expert that none reached) nothing."""
    counts = [float(row.get("tokens", 1)) for row in rows] if weights is None else list(weights)
    total = sum(counts) or 1.0
    return [count / total for count in counts]


def _add(name: str, files: Sequence[CovarianceFile], shares: Sequence[float]) -> tuple[Doubles, dict[str, Any]]:
    """Return the sum as it is stored, before rounding, and its figures."""
    parts = [file.read(name) for file in files]
    trace = sum(share * part.trace for share, part in zip(shares, parts, strict=True))
    values: list[Floats] = [part.values for part in parts]
    if not parts[0].is_factor:
        total = sum_of_wholes(shares, values)
        return total[np.triu_indices(len(total))], {"trace": trace, "energy": 1.0}
    total = sum_of_factors(shares, values)
    figures: dict[str, Any] = {"trace": trace, "energy": float(np.square(total).sum()) / trace if trace else 1.0}
    if files[0].rows[name].get("dtype") == "BF16":
        rounded = torch.from_numpy(total).bfloat16().double().numpy()
        length = float(np.linalg.norm(total))
        figures["rounding"] = float(np.linalg.norm(rounded - total)) / length if length else 0.0
    return total, figures
