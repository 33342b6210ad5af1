"""The application that every command registers with, and the options that several share."""

from collections.abc import Callable
from typing import Annotated

import typer

from fisherkit._version import __version__
from fisherkit.cli import console

app = typer.Typer(
    name="fisherkit",
    help="Which weights of a language model carry what it can do, which may change, and what of a fine-tune to keep. "
    "Works on checkpoint files, also when they are larger than memory.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MACHINE, OUTPUT = "How it runs", "What comes out"

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel=OUTPUT)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is in OUT.partial/.", rich_help_panel=MACHINE)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no remarks.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]


def run(command: Callable[[], object], *, debug: bool, hint: str = "") -> None:
    """Run a command to its exit code; what goes wrong becomes one line."""
    raise typer.Exit(console.guard(command, debug=debug, hint=hint))


def sayer(quiet: bool) -> Callable[[str], None]:
    """Where remarks for people go."""
    return console.say if not quiet else lambda line: None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fisherkit {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None: ...
