"""Tensors whose deltas are solved for, of one fine-tune or several: by covariances or by Fishers."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from fisherkit.checkpoint.target import is_folder
from fisherkit.errors import OptionError, some_names
from fisherkit.kernels.tensor_pair import DeltaCounts, TensorPair
from fisherkit.methods.merge.fine_tunes import FineTunes
from fisherkit.methods.merge.fisher_merge import FisherMerge
from fisherkit.methods.merge.lora_output import LoraOutput, lora_files
from fisherkit.methods.merge.pair_run import Loaded, Run, finished, load_pair
from fisherkit.methods.merge.regmean import Filters, RegMean
from fisherkit.options import MergeOptions
from fisherkit.pairs.rewrite import Changed, Rewrite, TensorRow
from fisherkit.pairs.solve import change_rows, flat_shape, mean_of


class Rule(Protocol):
    """Makes one delta of those of all fine-tunes, for the tensors that it knows enough of."""

    @property
    def covered(self) -> frozenset[str]:
        """BASE's tensors that it knows how to solve for."""
        ...

    def change(self, pair: TensorPair, name: str) -> tuple[DeltaCounts, TensorRow]:
        """Overwrite BASE's values of a covered tensor; returns counts, and what its row says of the solve."""
        ...


@dataclass(frozen=True)
class Solver:
    """Rule of a run, and the fine-tunes besides FT that it is about."""

    rule: Rule
    tunes: FineTunes


def open_solver(stack: ExitStack, run: Run, options: MergeOptions, filters: Filters) -> Solver | None:
    """Open what the options name for a solve, and say which tensors it leaves; None where they name nothing.

    Args:
        stack: closes it.
        run: BASE and FT.
        options: of the command.
        filters: decompositions that it may share with solvers of other strengths.

    Raises:
        CheckpointError: a file or a fine-tune cannot be read, or does not belong to BASE.
        OutputError: the output is one of the fine-tunes.
    """
    if not options.solves:
        return None
    tunes = FineTunes(stack, run, [tune for tune, _ in options.also])
    rule: Rule = (
        RegMean(stack, run, options, tunes, filters)
        if options.regmean is not None
        else FisherMerge(stack, run, options, tunes)
    )
    solver = Solver(rule, tunes)
    left = unsolved(solver, run)
    if left:
        whose = "BASE's" if options.rest == "base" else "the mean of the fine-tunes'" if options.also else "FT's"
        what = "covariance" if options.regmean is not None else "Fisher"
        run.request.say(f"note: {len(left)} tensors have no {what} and become {whose}: {some_names(left)}")
    return solver


def open_lora(run: Run, options: MergeOptions, solver: Solver | None, rewrite: Rewrite) -> LoraOutput | None:
    """Open the adapter that takes the factors of every solved delta; None where none is asked for, or all is done.

    Raises:
        OptionError: the output is a file, which has no room for an adapter.
        OutputError: no room on the disk.
    """
    if options.lora_rank is None or solver is None or not isinstance(solver.rule, RegMean):
        return None
    assert run.request.targets is not None
    if not is_folder(run.request.targets.main):
        raise OptionError(f"--lora-rank: {run.request.targets.main} is a file; the adapter needs a folder to lie in")
    if rewrite.folder is None or lora_files(rewrite.folder):
        return None
    names = [name for name in run.chosen.names if name in solver.rule.covered]
    shapes = {name: run.tensors.info(name).shape for name in names}
    work, resume = run.request.targets.work_folder, any(name in rewrite.rows for name in names)
    lora = LoraOutput(work, shapes, solver.rule, options.lora_rank, resume=resume)
    solver.rule.keep_factors = lora.add
    return lora


def unsolved(solver: Solver | None, run: Run) -> list[str]:
    """Return the tensors that take part and that are not solved for; none where nothing is."""
    return [name for name in run.chosen.names if name not in solver.rule.covered] if solver is not None else []


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
    if name not in solver.rule.covered and options.rest == "base":
        return Changed(run.tensors.base(name), {})
    pair, remarks = load_pair(run.tensors, name, options)
    figures: TensorRow = {}
    if name in solver.rule.covered:
        counts, figures = solver.rule.change(pair, name)
    else:
        others, shape = solver.tunes.load(name, pair.base), flat_shape(run.tensors.info(name).shape)
        counts = change_rows(
            pair, others, shape, input_axis=1, scale=options.alpha, change=mean_of(options.tune_weights)
        )
    return finished(run, options, name, Loaded(pair, figures | remarks), counts, options.alpha)


def solve_totals(rows: Mapping[str, TensorRow]) -> dict[str, Any]:
    """Return what a solve keeps of the delta over all tensors; empty where nothing was solved for.

    Args:
        rows: of the report.

    Returns:
        Under ``regmean`` or ``fisher`` the shares ``new_kept`` and ``old_kept`` of the delta's energy in the metric of
        the new and of the old inputs (or Fisher), and of the former the ``damping_share``, of covariances.
    """
    for kind in ("regmean", "fisher"):
        found = [row[kind] for row in rows.values() if kind in row]
        if found:
            return {kind: _total(found)}
    return {}


def _total(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shares: dict[str, Any] = {"tensors": len(found)}
    for which in ("new", "old"):
        energy = math.fsum(one[f"{which}_energy"] for one in found)
        left = math.fsum(one[f"{which}_energy"] * one[f"{which}_kept"] for one in found)
        shares[f"{which}_kept"] = left / energy if energy else 1.0
    if "damping_share" in found[0]:
        parts = [(one["new_energy"] * one["new_kept"], one["damping_share"]) for one in found]
        left = math.fsum(energy for energy, _ in parts)
        shares["damping_share"] = math.fsum(energy * share for energy, share in parts) / left if left else 0.0
    return shares


def solve_line(totals: Mapping[str, Any]) -> str | None:
    """Return what a person should know of a solve; None where there was none."""
    for kind, what in (("regmean", "does to the layers' outputs"), ("fisher", "costs by the Fishers' quadratic")):
        if kind in totals:
            found = totals[kind]
            line = (
                f"of what the fine-tune {what}, {found['new_kept']:.1%} is left on new inputs and "
                f"{found['old_kept']:.1%} on old ones"
            )
            if "damping_share" in found:
                line += f"; {found['damping_share']:.1%} of the former lies where no new input does (--damping decides)"
            return line
    return None
