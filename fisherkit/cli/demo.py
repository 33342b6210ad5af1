"""``fisherkit demo``."""

from pathlib import Path
from typing import Annotated

import typer

from fisherkit import console
from fisherkit.cli.app import Debug, Quiet, app, run, sayer
from fisherkit.options import ExtractOptions


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where its files go.")] = Path("demo"),
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a small real model here in about a minute, then extract and inspect its Fisher.

    Example: fisherkit demo
    """

    def command() -> None:
        from fisherkit.methods import demo as methods_demo
        from fisherkit.methods import fisher, summary

        say = sayer(quiet)
        options = ExtractOptions(force=(folder / "model").is_dir())  # in a folder of ours, an earlier demo's output
        made = methods_demo.make_model(folder, track=console.tracker("demo", quiet=quiet), say=say)
        out = folder / "fisher.pt"
        say(f"\n$ fisherkit extract {made} builtin -o {out}")
        fisher.extract(made, "builtin", out, options, track=console.tracker("extract", quiet=quiet), say=say)
        say(f"\n$ fisherkit inspect {out}")
        console.show(summary.inspect(out))
        say(
            "\nWith a model and prompts of your own:\n"
            "  fisherkit extract org/name prompts.jsonl -o fisher.pt\n"
            "  fisherkit inspect fisher.pt -o report.html\n"
            "  fisherkit inspect fisher.pt --by tensor --sort mean | head"
        )

    run(command, debug=debug)
