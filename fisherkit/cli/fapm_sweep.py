"""Sparsities of ``fapm`` that are scored together, and of which one is written."""

from collections.abc import Sequence
from dataclasses import replace

from fisherkit.cli import console, shared
from fisherkit.cli import sweep as sweeps
from fisherkit.cli.app import sayer
from fisherkit.options import FapmOptions


def sweep_fapm(
    pair: tuple[str, str],
    options: FapmOptions,
    sparsities: Sequence[float],
    sweep: sweeps.Sweep,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Score the points, and write the one that is advised where there is an output.

    Args:
        pair: BASE and FT.
        options: of every point, but for its sparsity.
        sparsities: of the points.
        sweep: what is asked for.
        as_json: print everything as JSON.
        quiet: no progress, no remarks.
    """
    from fisherkit.methods.merge import fapm as methods
    from fisherkit.methods.merge.points import open_fapm_points

    out, sparse = sweep.outputs
    if sparse is not None:
        methods.check_sparse(sparse, options)
    sweeps.check(sweep, pair)
    points = {f"{options.metric} {share:g}": replace(options, sparsity=share, density=None) for share in sparsities}
    controls = _controls(points) if sweep.controls else {}
    every, say = {**points, **controls}, sayer(quiet)
    track = console.tracker("fapm", quiet=quiet, begin="loading torch and transformers")
    room = sweeps.room_for_points()
    with open_fapm_points(
        *pair, list(every.values()), targets=sweep.targets(), room=room, track=track, say=say
    ) as opened:
        report = sweeps.score_points(opened, list(every), sweep, track, say)
    advice = sweeps.conclude(report, sweep, list(points), list(controls), as_json=as_json, say=say)
    main = out or sparse
    if main is not None:
        own = points[sweeps.chosen_or_refuse(advice, main)]
        made = methods.fapm(*pair, out, own, sparse=sparse, command=shared.typed(), track=track, say=say)
        console.say_kept(made.totals, selects=own.selects, quiet=quiet)
        say(f"{main}: made with --sparsity {own.sparsity:g}")


def _controls(points: dict[str, FapmOptions]) -> dict[str, FapmOptions]:
    """Return random selections of the same densities; none where the points are just that."""
    return {
        f"random {one.sparsity:g}": replace(one, metric="random") for one in points.values() if one.metric != "random"
    }
