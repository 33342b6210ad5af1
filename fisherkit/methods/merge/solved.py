"""Tensors whose deltas are solved for, of one fine-tune or several: by covariances of inputs."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Protocol

from fisherkit.errors import some_names
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair
from fisherkit.methods.merge.fine_tunes import FineTunes
from fisherkit.methods.merge.pair_run import Run, load_pair, refuse_bad_values
from fisherkit.methods.merge.regmean import RegMean
from fisherkit.options import MergeOptions
from fisherkit.pairs.rewrite import Changed, TensorRow


class Solver(Protocol):
    """Makes one delta of those of all fine-tunes."""

    @property
    def fingerprints(self) -> list[str]:
        """Texts that change when the values of further fine-tunes do."""
        ...

    @property
    def covered(self) -> frozenset[str]:
        """BASE's tensors that it knows how to solve for."""
        ...

    def change(self, pair: TensorPair, name: str) -> tuple[DeltaCounts, TensorRow]:
        """Overwrite BASE's values of a covered tensor; returns counts, and what its row says of the solve."""
        ...

    def change_rest(self, pair: TensorPair, name: str) -> DeltaCounts:
        """Overwrite BASE's values of any other tensor."""
        ...


def open_solver(stack: ExitStack, run: Run, options: MergeOptions) -> Solver | None:
    """Open what the options name for a solve, and say which tensors it leaves; None where they name nothing.

    Raises:
        CheckpointError: a file or a fine-tune cannot be read, or does not belong to BASE.
        OutputError: the output is one of the fine-tunes.
    """
    if not options.solves:
        return None
    solver = RegMean(stack, run, options, FineTunes(stack, run, [tune for tune, _ in options.also]))
    left = unsolved(solver, run)
    if left:
        whose = "BASE's" if options.rest == "base" else "the mean of the fine-tunes'" if options.also else "FT's"
        run.request.say(f"note: {len(left)} tensors have no covariance and become {whose}: {some_names(left)}")
    return solver


def unsolved(solver: Solver | None, run: Run) -> list[str]:
    """Return the tensors that take part and that are not solved for; none where nothing is."""
    return [name for name in run.chosen.names if name not in solver.covered] if solver is not None else []


def solve_tensor(run: Run, options: MergeOptions, solver: Solver, name: str) -> Changed:
    """Return a tensor that takes part as the output should have it.

    Args:
        run: BASE and FT.
        options: of the command.
        solver: of the run.
        name: the tensor.

    Raises:
        CheckpointError: values that are not finite, or beyond BASE's type.
    """
    info, place = run.tensors.info(name), run.chosen.places[name]
    if name not in solver.covered and options.rest == "base":
        return Changed(run.tensors.base(name), {})
    pair, remarks = load_pair(run.tensors, name, options)
    figures: TensorRow = {}
    if name in solver.covered:
        counts, figures = solver.change(pair, name)
    else:
        counts = solver.change_rest(pair, name)
    refuse_bad_values(run.tensors, name, counts.nonfinite, options, pair.base)
    if counts.rounded_away:
        remarks |= {"changed": counts.kept + counts.rounded_away, "rounded_away": counts.rounded_away}
    row = {
        "layer": place.layer,
        "module": place.module,
        "shape": list(info.shape),
        "weights": info.numel,
        "kept": counts.kept,
        "zero_deltas": counts.zero_deltas,
        "nonfinite": counts.nonfinite,
        "scale": options.alpha,
        "energy": counts.energy,
        "energy_kept": counts.energy_kept / counts.energy if counts.energy else 0.0,
    }
    return Changed(pair.base, row | figures | remarks)


def solve_totals(rows: Mapping[str, TensorRow]) -> dict[str, Any]:
    """Return what a solve keeps of the delta over all tensors; empty where nothing was solved for by covariances.

    Args:
        rows: of the report.

    Returns:
        Under ``regmean`` the shares ``new_kept`` and ``old_kept`` of what the delta does to the layers' outputs on new
        and on old inputs (mean squares, added up), and ``damping_share`` of the former.
    """
    found = [row["regmean"] for row in rows.values() if "regmean" in row]
    if not found:
        return {}
    new, old = (sum(one[key] for one in found) for key in ("new_energy", "old_energy"))
    left, old_left = (sum(one[f"{key}_energy"] * one[f"{key}_kept"] for one in found) for key in ("new", "old"))
    damped = sum(one["new_energy"] * one["new_kept"] * one["damping_share"] for one in found)
    return {
        "regmean": {
            "tensors": len(found),
            "new_kept": left / new if new else 1.0,
            "old_kept": old_left / old if old else 1.0,
            "damping_share": damped / left if left else 0.0,
        }
    }


def solve_line(totals: Mapping[str, Any]) -> str | None:
    """Return what a person should know of a solve; None where there was none by covariances."""
    found = totals.get("regmean")
    if found is None:
        return None
    return (
        f"of what the fine-tune does to the layers' outputs, {found['new_kept']:.1%} is left on new inputs and "
        f"{found['old_kept']:.1%} on old ones; {found['damping_share']:.1%} of the former lies where no new input "
        "does, and is decided by --damping"
    )
