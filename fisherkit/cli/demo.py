"""``fisherkit demo``."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli import console
from fisherkit.cli.app import Command, Debug, Quiet, app, run, sayer
from fisherkit.methods.inspect.records import Record
from fisherkit.options import ExtractOptions, FapmOptions, MergeOptions, Metric
from fisherkit.progress import Say

METRICS: tuple[Metric, ...] = ("fapm", "magnitude", "random")


@app.command(cls=Command)
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where its files go.")] = Path("demo"),
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a small real model here, measure its Fisher, fine-tune it and prune the fine-tune: about two minutes.

    Example: fisherkit demo
    """

    def command() -> None:
        from fisherkit.methods.demo import model as methods_demo

        say = sayer(quiet)
        again = (folder / "model").is_dir()  # in a folder of ours, an earlier demo's output
        made = methods_demo.make_model(folder, track=console.tracker("demo", quiet=quiet), say=say)
        _measure(made, folder / "fisher.pt", say, quiet=quiet, again=again)
        _prune(made, folder, say, quiet=quiet, again=again)
        say(
            "\nWith models and prompts of your own:\n"
            "  fisherkit extract org/name prompts.jsonl -o fisher.pt\n"
            "  fisherkit inspect fisher.pt -o report.html\n"
            "  fisherkit fapm org/name my-fine-tune --sweep 0.5,0.7,0.9 --prompts old=old.jsonl --prompts new=new.jsonl"
        )

    run(command, debug=debug)


def _measure(model: Path, out: Path, say: Say, *, quiet: bool, again: bool) -> None:
    """Extract and inspect."""
    from fisherkit.methods.extract import measure
    from fisherkit.methods.inspect import summary

    _show(say, "extract", model, "builtin", "-o", out)
    options, track = ExtractOptions(force=again), console.tracker("extract", quiet=quiet)
    measure.extract(model, "builtin", out, options, track=track, say=say)
    _show(say, "inspect", out)
    console.show(summary.inspect(out))


def _prune(model: Path, folder: Path, say: Say, *, quiet: bool, again: bool) -> None:
    """Fine-tune on another kind of text, prune by each metric, and score everything on old and new questions."""
    from fisherkit.methods.demo import fine_tune

    say("")
    track = console.tracker("tune", quiet=quiet)
    models = {"base": model, "tuned": fine_tune.tune_model(model, folder / "tuned", track=track, say=say)}
    for metric in METRICS:
        models[metric] = _fapm(model, folder / "tuned", folder / metric, metric, say, quiet=quiet, again=again)
    models["regmean"] = _repair(model, folder / "tuned", folder, say, quiet=quiet, again=again)
    _score(models, folder, say, quiet=quiet)


def _score(models: Mapping[str, Path], folder: Path, say: Say, *, quiet: bool) -> None:
    """Score all models on questions that none has read: the base's kind (old), and the fine-tune's (new)."""
    from fisherkit.methods.demo import held_out
    from fisherkit.methods.score.score import score

    sets = held_out.write_sets(folder)
    given = [word for name, path in sets.items() for word in ("--prompts", f"{name}={path}")]
    _show(say, "score", *models.values(), *given)
    report = score(list(models.values()), sets, track=console.tracker("score", quiet=quiet), say=say)
    rows: list[Record] = []
    for name, one in zip(models, report.checkpoints, strict=True):
        old, new = (one.sets[kind] for kind in ("old", "new"))
        rows.append({"model": name, "old": old.loss, "new": new.loss, "new_exact": new.exact})
    console.show_rows(rows, ("model", "old", "new", "new_exact"))
    say("Loss in nats per token of the answers, and the share of answers that are right to the letter.")
    say("One seed of a toy: it shows what the commands do, not which method is best.")


def _fapm(base: Path, tuned: Path, out: Path, metric: Metric, say: Say, *, quiet: bool, again: bool) -> Path:
    """Run fapm by a metric, with a figure where that is fapm's own."""
    from fisherkit.methods.merge import fapm
    from fisherkit.render import files

    figure = out.with_suffix(".html") if metric == "fapm" else None
    command = _show(say, "fapm", base, tuned, out, *(("--figure", figure) if figure else ("--metric", metric)))
    if figure is not None:
        files.check_figure(figure, force=again)
    report = fapm.fapm(
        base,
        tuned,
        out,
        FapmOptions(metric=metric, force=again),
        figure=figure is not None,
        command=command,
        track=console.tracker("fapm", quiet=quiet),
        say=say,
    )
    console.say_kept(report.totals, selects=True, quiet=quiet)
    if figure is not None:
        files.write_pruning(report, figure)
        say(f"{figure}: changes against weights, the cut, and where the kept part lies")
    return out


def _repair(base: Path, tuned: Path, folder: Path, say: Say, *, quiet: bool, again: bool) -> Path:
    """Measure what goes into the layers, of the base on old rows and of the fine-tune on new ones, and solve."""
    from fisherkit.methods.demo import held_out
    from fisherkit.methods.extract import measure
    from fisherkit.methods.merge import merge

    files = folder / "old.safetensors", folder / "new.safetensors"
    for model, rows, file in zip((base, tuned), held_out.write_learnt(folder).values(), files, strict=True):
        _show(say, "extract", model, rows, "-o", file, "--statistics", "inputs")
        options, track = ExtractOptions(statistics="inputs", force=again), console.tracker("extract", quiet=quiet)
        measure.extract(model, rows, file, options, track=track, say=say)
    out = folder / "regmean"
    command = _show(say, "merge", base, tuned, out, "--regmean", *files)
    track = console.tracker("merge", quiet=quiet)
    merge.merge(base, tuned, out, MergeOptions(regmean=files, force=again), command=command, track=track, say=say)
    return out


def _show(say: Say, *words: str | Path) -> list[str]:
    """Say a command as one would type it, and return it."""
    command = ["fisherkit", *map(str, words)]
    say(f"\n$ {shlex.join(command)}")
    return command
