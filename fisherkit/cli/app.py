"""Application that every command registers with, and the options that several share."""

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fisherkit._version import __version__
from fisherkit.cli import console
from fisherkit.errors import OptionError, fit_line
from fisherkit.options.checks import not_a_choice
from fisherkit.progress import Say


class Commands(TyperGroup):
    """The commands; what typer says of a word that it does not know is at most 300 characters long."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(getattr(error, "message", None), str):  # typer's own; their class is another in each version
                error.message = fit_line(error.message)  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="fisherkit",
    cls=Commands,
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


# Click and typer put it like this in every version since typer 0.19; the parameter's type is another in each.
_REFUSED = re.compile(r"""(?P<quote>['"])(?P<given>.*)(?P=quote) is not (?:one of )?(?P<choices>'.*')""", re.DOTALL)


class Command(TyperCommand):
    """A command that refuses a wrong choice in one line, like every other mistake, and guesses at what was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; exit with 2 for a word that is none of an option's choices."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            match = _REFUSED.search(error.message)
            if match is None or error.param is None:
                raise
            option = max(error.param.opts, key=len).removeprefix("--")
            choices = re.findall("'([^']*)'", match["choices"])
            console.say(f"Error: {fit_line(console.one_line(not_a_choice(option, match['given'], choices)))}")
            raise typer.Exit(OptionError.exit_code) from None


def run(command: Callable[[], object], *, debug: bool, hint: str = "") -> None:
    """Run a command to its exit code; what goes wrong becomes one line."""
    raise typer.Exit(console.guard(command, debug=debug, hint=hint))


def sayer(quiet: bool) -> Say:
    """Return the function that remarks for people go to."""
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
