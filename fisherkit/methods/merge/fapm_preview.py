"""Previews of ``fapm`` that write nothing: a sweep over sparsities, and a plan of time and memory."""

import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from fisherkit.errors import OptionError
from fisherkit.kernels.top_k import quota
from fisherkit.methods.merge.fapm_prune import kept_share, make_pruners
from fisherkit.methods.merge.fapm_report import FapmReport, make_report
from fisherkit.methods.merge.output import say_warnings
from fisherkit.methods.merge.pair_run import Request, Run, open_run, refuse_bad_values
from fisherkit.methods.merge.quotas import find_groups, group_sizes
from fisherkit.options import FapmOptions, exact_share
from fisherkit.pairs.rewrite import TensorRow
from fisherkit.progress import Say, Track

_TRIAL_SECONDS = 1


def sweep_fapm(
    base: str | Path,
    tuned: str | Path,
    sparsities: Sequence[float],
    options: FapmOptions | None = None,
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> list[FapmReport]:
    """Report what ``fapm`` would keep at several sparsities, every pass over the files serving all of them.

    Args:
        base: as for fapm.
        tuned: as for fapm.
        sparsities: shares of entries that go back to the base.
        options: see FapmOptions; its own sparsity does not count.
        track: progress.
        say: gets remarks for people.

    Raises:
        CheckpointError, OptionError: as for fapm.
    """
    options = options or FapmOptions()
    if not options.selects:
        raise OptionError(f"--sweep is for metrics that select, not {options.metric}")
    with open_run(Request("fapm", str(base), str(tuned), None, options, None, track, say)) as run:
        pruners = make_pruners(run, options, [1 - exact_share(sparsity) for sparsity in sparsities], write=False)
        rows: list[dict[str, TensorRow]] = [{} for _ in pruners]
        for at, name in enumerate(run.tensors.walk(run.chosen.names)):
            track("sweeping", at, len(run.chosen.names))
            loaded = pruners[0].load(name)
            for pruner, own in zip(pruners, rows, strict=True):
                outcome = pruner.prune(name, loaded.pair)[1]
                refuse_bad_values(run.tensors, name, outcome.counts.nonfinite, options)
                own[name] = pruner.row(name, outcome, loaded.remarks)
        track("sweeping", len(run.chosen.names), len(run.chosen.names))
        reports = [make_report(run, options, pruner.share, own) for pruner, own in zip(pruners, rows, strict=True)]
        say_warnings(reports[0].warnings, say)
        return reports


def plan_fapm(
    base: str | Path, tuned: str | Path, options: FapmOptions | None = None, *, say: Say = lambda line: None
) -> dict[str, Any]:
    """Return what ``fapm`` would do: tensors, sizes, memory, and the time it would take on warm files, tried on a part.

    Args:
        base: as for fapm.
        tuned: as for fapm.
        options: see FapmOptions.
        say: gets remarks for people.

    Raises:
        CheckpointError, OptionError: as for fapm.
    """
    options = options or FapmOptions()
    with open_run(Request("fapm", str(base), str(tuned), None, options, None, lambda *_: None, say)) as run:
        share = kept_share(run, options)
        index = run.checkpoints.base.index.tensors
        chosen = [index[name] for name in run.chosen.names]
        weights = sum(info.numel for info in chosen)
        largest = max(info.nbytes for info in index.values())
        in_float32 = 4 * max(info.numel for info in chosen)
        more = 3 * in_float32 if run.checkpoints.tuned.kind == "adapter" else 0
        sizes = group_sizes(run.tensors, find_groups(run.chosen, options.scope))
        return {
            "base": run.request.base,
            "tuned": run.request.tuned,
            "kind": run.checkpoints.tuned.kind,
            "metric": options.metric,
            "scope": options.scope,
            "density": float(share),
            "tensors": len(chosen),
            "weights": weights,
            "kept_at_most": sum(quota(share, size) for size in sizes.values()),
            "left_alone": len(index) - len(chosen),
            "output_bytes": sum(info.nbytes for info in index.values()),
            "peak_bytes": 2 * largest + more + run.tensors.pool.threads * 5_000_000 + 60_000_000,
            "seconds_warm": _try_out(run, options, share, weights),
        }


def _try_out(run: Run, options: FapmOptions, share: Fraction, weights: int) -> float:
    """Seconds for all tensors, from those that fit into one second; a shared quota takes three passes."""
    started, done = time.monotonic(), 0
    alone = replace(options, scope="tensor")
    pruner = make_pruners(run, alone, [share], write=False)[0]
    for name in run.chosen.names:
        pruner.prune(name, pruner.load(name).pair)
        done += run.tensors.info(name).numel
        if time.monotonic() - started > _TRIAL_SECONDS:
            break
    passes = 1 if options.scope == "tensor" else 3
    return round(1.3 * passes * (time.monotonic() - started) * weights / max(done, 1), 1)
