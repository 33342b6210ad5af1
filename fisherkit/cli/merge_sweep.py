"""Strengths of ``merge``: a value each, or several, which are scored together and of which one is written."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

from fisherkit.cli import console, shared
from fisherkit.cli import sweep as sweeps
from fisherkit.cli.app import sayer
from fisherkit.errors import OptionError
from fisherkit.options import MergeOptions, PairOptions
from fisherkit.options.checks import parse_numbers

WISE_FT = (0.25, 0.5, 0.75)
"""Factors of the controls, where the sweep itself is over none."""


def points_of(options: MergeOptions, strengths: Mapping[str, str]) -> dict[str, MergeOptions]:
    """Return the options of every combination of strengths, by a name that says what differs.

    Args:
        options: all others.
        strengths: fields of MergeOptions, with one number or several as a person types them.

    Raises:
        OptionError: a strength that is no number, or outside its range.
    """
    values = {name: parse_numbers(name.replace("_", "-"), text) for name, text in strengths.items()}
    varied = [name for name, several in values.items() if len(several) > 1]
    points = {}
    for chosen in product(*values.values()):
        given = dict(zip(values, chosen, strict=True))
        words = [f"{name.replace('_', '-')} {given[name]:g}" for name in varied]
        points[" ".join(words) or "merge"] = replace(options, **given)  # type: ignore[arg-type]  # all are numbers
    return points


def controls_of(points: Mapping[str, MergeOptions]) -> dict[str, MergeOptions]:
    """Return plain interpolations between BASE and FT (Wise-FT); none where the points are just that."""
    first = next(iter(points.values()))
    if not any((first.mask, first.subspace, first.layer_scale, first.regmean, first.fisher)):
        return {}
    alphas = tuple(dict.fromkeys(one.alpha for one in points.values()))
    shared_fields = {field.name: getattr(first, field.name) for field in fields(PairOptions)}
    factors = alphas if len(alphas) > 1 else WISE_FT
    return {f"wise-ft {alpha:g}": MergeOptions(**shared_fields, alpha=alpha) for alpha in factors}


def one_point(points: Mapping[str, MergeOptions], out: Path | None) -> tuple[MergeOptions, Path]:
    """Return the only point and its output.

    Raises:
        OptionError: there are several, or no output.
    """
    if len(points) > 1:
        raise OptionError(
            f"{len(points)} points, such as {next(iter(points))}, are a sweep, which prompts judge: add --prompts "
            "old=FILE --prompts new=FILE"
        )
    if out is None:
        raise OptionError("nothing to write: give OUT, the folder to make")
    return next(iter(points.values())), out


def sweep_merge(
    pair: tuple[str, str],
    points: Mapping[str, MergeOptions],
    sweep: sweeps.Sweep,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Score the points, and write the one that is advised where there is an output.

    Args:
        pair: BASE and FT.
        points: options by name.
        sweep: what is asked for.
        as_json: print everything as JSON.
        quiet: no progress, no remarks.
    """
    from fisherkit.methods.merge import merge as methods
    from fisherkit.methods.merge.points import open_merge_points

    sweeps.check(sweep, pair)
    say, out = sayer(quiet), sweep.outputs[0]
    track = console.tracker("merge", quiet=quiet, begin="loading torch and transformers")
    controls = controls_of(points) if sweep.controls else {}
    every: Sequence[str] = [*points, *controls]
    options = [*points.values(), *controls.values()]
    with open_merge_points(*pair, options, targets=sweep.targets(), track=track, say=say) as opened:
        report = sweeps.score_points(opened, every, sweep, track, say)
    advice = sweeps.conclude(report, sweep, list(points), list(controls), as_json=as_json, say=say)
    if out is not None:
        chosen = sweeps.chosen_or_refuse(advice, out)
        own = points[chosen]
        made = methods.merge(*pair, out, own, command=shared.typed(), track=track, say=say)
        console.say_kept(made.totals, selects=False, quiet=quiet)
        say(f"{out}: made with {chosen}")
