"""Output on the terminal: what goes to which stream, progress, and errors in one line.

Data goes to stdout, words for people to stderr. Tables are for eyes alone: what is not a terminal gets rows of full
names and exact numbers. How a table looks is the business of ``fisherkit.render.terminal``.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer

from fisherkit.cli import progress
from fisherkit.errors import FisherkitError, fit_line
from fisherkit.options.checks import one_of
from fisherkit.options.inspect import Form
from fisherkit.progress import Track
from fisherkit.render import formatting

if TYPE_CHECKING:
    from rich.console import Console

    from fisherkit.methods.inspect.records import Record
    from fisherkit.methods.inspect.samples import WorstSamples
    from fisherkit.methods.inspect.summary import Summary
    from fisherkit.methods.score.report import ScoreReport

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 1, 130, 141


def say(text: str) -> None:
    """Print a line for people, on stderr."""
    _write(sys.stderr, text + "\n")


def show(summary: "Summary", form: Form = "auto", *, every: bool = False) -> None:
    """Print a summary on stdout as ``table``, ``tsv``, ``csv``, ``json`` or ``jsonl``, and its warnings for people.

    Args:
        summary: of a file.
        form: ``auto`` is a table on a terminal and TSV anywhere else.
        every: the table has a row for every layer, where many would fold into groups.

    Raises:
        OptionError: another form.
    """
    one_of("format", form, Form)
    from fisherkit.methods.inspect.records import render
    from fisherkit.render import summary_text, terminal

    if form == "auto":
        form = "table" if sys.stdout.isatty() else "tsv"
    for note in summary.notes:
        say(f"note: {formatting.printable(note)}")
    if form == "table":
        terminal.draw(summary, _screen(), every=every)
        return
    for warning in summary_text.warnings(summary):
        say(f"warning: {warning}")
    _write(sys.stdout, render(summary.records(), summary.columns, form))


def show_text(text: str) -> None:
    """Print text on stdout as it is."""
    _write(sys.stdout, text)


def show_facts(facts: Mapping[str, object], *, as_json: bool = False) -> None:
    """Print named facts on stdout: as JSON, or a name and its value per line."""
    if as_json:
        _write(sys.stdout, json.dumps(facts, allow_nan=False) + "\n")
        return
    for name, value in facts.items():
        _write(sys.stdout, f"{name}\t{value if isinstance(value, str) else json.dumps(value)}\n")


def show_rows(rows: "Sequence[Record]", columns: Sequence[str]) -> None:
    """Print rows on stdout: a table on a terminal, TSV with exact numbers anywhere else."""
    if sys.stdout.isatty():
        from fisherkit.render import terminal

        terminal.draw_rows(rows, columns, _screen())
    else:
        from fisherkit.methods.inspect.records import render

        _write(sys.stdout, render(rows, columns, "tsv"))


def show_score(report: "ScoreReport") -> None:
    """Print a score on stdout: tables on a terminal, TSV with exact numbers anywhere else."""
    if sys.stdout.isatty():
        from fisherkit.render import score_table

        score_table.draw_score(report, _screen())
    else:
        from fisherkit.methods.inspect.records import render

        _write(sys.stdout, render(report.records(), report.columns, "tsv"))


def show_samples(samples: "WorstSamples", form: Form, *, every: bool) -> None:
    """Print samples of a score on stdout, in a form as ``show`` has it; a table of all rows only with ``every``."""
    one_of("format", form, Form)
    if form == "table" or (form == "auto" and sys.stdout.isatty()):
        from fisherkit.render import score_table

        score_table.draw_samples(samples, _screen(), every=every)
    else:
        from fisherkit.methods.inspect.records import render

        _write(sys.stdout, render(samples.rows, samples.columns, "tsv" if form == "auto" else form))


def say_kept(totals: Mapping[str, Any], *, selects: bool, quiet: bool = False) -> None:
    """Tell on stderr what is left of a delta; ``selects`` where its entries are FT's as they are."""
    if not quiet:
        counted = f"{totals['kept']:,} of {totals['weights']:,} entries"
        share, left = f"({totals['density']:.2%})", f"{totals['energy_kept']:.1%} of the squared delta"
        done = f"kept {counted} {share}, {left}" if selects else f"{counted} {share} differ from BASE's; {left}"
        say(f"{done}; {totals['zero_deltas']:,} had not changed")


def _screen() -> "Console":
    """Return stdout as rich draws on it; names in square brackets or between colons stay as they are."""
    from rich.console import Console

    _never_fail(sys.stdout)
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _write(stream: TextIO, text: str) -> None:
    _never_fail(stream)
    stream.write(text)


def _never_fail(stream: TextIO) -> None:
    """Names may hold what the stream's encoding cannot: spell it out instead of failing."""
    reconfigure = getattr(stream, "reconfigure", None)  # streams that tests put in place have none
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def tracker(label: str, *, quiet: bool = False, begin: str = "") -> Track:
    """Return a progress function for the library, see cli.progress; ``quiet`` says nothing at all.

    Args:
        label: the command.
        quiet: no progress.
        begin: said at once, before the seconds that imports take.
    """
    return (lambda stage, done, total: None) if quiet else progress.tracker(label, say, begin=begin)


# Errors


def guard(function: Callable[[], object], *, debug: bool = False, hint: str = "") -> int:
    """Run a command and return its exit code; what goes wrong becomes one line on stderr.

    0 done, 1 failed, 2 usage, 130 interrupted, 141 the reader of stdout went away (said by nobody). Typer's own
    exceptions pass. With ``debug`` all others pass as well, traceback and all, except a closed pipe, and what libraries
    warn of is shown.
    ``hint`` follows the word that a run was interrupted.
    """
    try:
        with _libraries_quiet(debug):
            function()
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        return EXIT_PIPE_CLOSED
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        say(f"Interrupted. {hint}".rstrip())
        return EXIT_INTERRUPTED
    except Exception as error:
        if debug:
            raise
        say(f"Error: {explain(error)}")
        if getattr(
            error, "unheard", False
        ):  # this rank is silent, and the first one, which should say it, is not there
            print(f"Error: {explain(error)}", file=sys.__stderr__, flush=True)
        return error.exit_code if isinstance(error, FisherkitError) else EXIT_FAILED
    return 0


@contextmanager
def _libraries_quiet(debug: bool) -> Iterator[None]:
    """Keep what libraries warn and log to themselves; users hear what concerns them from us."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if not debug:
            logging.disable(logging.WARNING)
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def explain(error: Exception) -> str:
    """Say in one line of at most 300 characters what went wrong; see fit_line for a longer one."""
    return fit_line(_reason(error))


def _reason(error: Exception) -> str:
    text = one_line(str(error))
    if isinstance(error, FisherkitError):
        return text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory; a smaller --group-size or --batch-tokens needs less ({text[:120] or 'no details'})"
    if isinstance(error, OSError) and error.strerror:
        where = f"{formatting.printable(str(error.filename))}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return f"unexpected {type(error).__name__}: {text[:200]}; run again with --debug for the whole story"


def one_line(text: str) -> str:
    """Return the text as one line without anything that a terminal might obey."""
    return formatting.printable(" ".join(text.split()))


def _forget_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain about the closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
