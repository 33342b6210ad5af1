"""Summaries and prunings as files to look at or to keep: ``.html``, ``.svg``, ``.png``, or rows as ``.csv``, ...

The page is one file without scripts or outside references, so it opens anywhere and years from now. Files are written
aside and renamed when whole.
"""

import html
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fisherkit.checkpoint.atomic import write_bytes
from fisherkit.errors import MissingLibraryError, OptionError, OutputError
from fisherkit.methods.inspect.records import Record, Value, render
from fisherkit.methods.inspect.summary import Summary
from fisherkit.render import formatting, summary_text, svg, svg_summary

if TYPE_CHECKING:
    from fisherkit.methods.merge.fapm_report import FapmReport

_PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #68707a; --line: #d5d9de; --paper: #ffffff; --alarm: #c62828; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa3ad; --line: #3a4048; --paper: #16191d;
  --alarm: #ff7b72; } }
body { font: 14px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin-top: 2.2rem; } p.dim { color: var(--dim); }
p.alarm { color: var(--alarm); font-weight: 600; } figure { margin: 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } table.made td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; } div.wide { overflow-x: auto; }
"""

_SHARES = ("share", "energy_kept")


def write_figure(summary: Summary, target: Path, *, force: bool = False) -> None:
    """Write a summary to ``target``; its suffix says as what.

    Raises:
        OptionError: a suffix that is not one of those above.
        OutputError: ``target`` exists (unless ``force``), belongs to what was inspected, or cannot be written.
        MissingLibraryError: ``.png`` without matplotlib.
    """
    draw = _WRITERS.get(target.suffix.lower())
    if draw is None:
        raise OptionError(f"{target}: a report ends in {', '.join(_WRITERS)}, not {target.suffix or 'nothing'!r}")
    if target.resolve() in {path.resolve() for path in _inputs(summary.path)}:
        raise OutputError(f"{target}: belongs to what is being inspected; choose another name")
    _check_target(target, force=force)
    write_bytes(target, draw(summary))


def write_pruning(report: "FapmReport", target: Path) -> None:
    """Draw what fapm kept, in place of what ``target`` holds: see check_figure, which asks before.

    Raises:
        OptionError: a suffix other than ``.html``, ``.svg`` and ``.png``.
        OutputError: ``target`` cannot be written.
        MissingLibraryError: ``.png`` without matplotlib.
    """
    check_figure(target, force=True)
    write_bytes(target, pruning_bytes(report, target.suffix.lower()))


def pruning_bytes(report: "FapmReport", suffix: str) -> bytes:
    """Return the figure of what fapm kept as the content of a file; the suffix is ``.html``, ``.svg`` or ``.png``."""
    from fisherkit.render import png, svg_fapm

    if suffix == ".png":
        return png.pruning_png(report)
    return _encode(svg_fapm.picture(report) if suffix == ".svg" else pruning_page(report))


def check_report(target: Path, *, force: bool) -> None:
    """Refuse a ``.json`` report that could not be written; raises OptionError or OutputError."""
    if target.suffix.lower() != ".json":
        raise OptionError(f"{target}: a report ends in .json")
    _check_target(target, force=force)


def check_figure(target: Path, *, force: bool) -> None:
    """Refuse a figure that could not be drawn; raises OptionError, OutputError or MissingLibraryError."""
    if target.suffix.lower() not in (".html", ".svg", ".png"):
        raise OptionError(f"{target}: a figure ends in .html, .svg or .png")
    if target.suffix.lower() == ".png":
        _need_matplotlib()
    _check_target(target, force=force)


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir() or (target.exists() and not force):
        raise OutputError(f"{target}: exists already; choose another name or add --force")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target}: there is no folder {target.parent}; make it first")


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingLibraryError("matplotlib", "a .png report")


def _inputs(path: Path) -> Iterable[Path]:
    """The inspected file and what extract wrote beside it."""
    if path.is_dir():
        return (path, path / "fisher.json", path / "layer_importance.json")
    importance = (path.with_name("layer_importance.json"), path.with_name(f"{path.stem}.layer_importance.json"))
    return (path, path.with_suffix(".json"), *importance)


# The pages


def page(summary: Summary) -> str:
    """One self-contained HTML page."""
    sections = [
        f'<p class="dim">{_safe(summary.path)}</p>',
        *(f'<p class="alarm">{_safe(warning)}</p>' for warning in summary_text.warnings(summary)),
        *(f'<p class="dim">{_safe(note)}</p>' for note in summary.notes),
        *(f"<p>{_safe(sentence)}</p>" for sentence in summary_text.sentences(summary)),
        f"<h2>Where it lies</h2><figure>{svg_summary.layers(summary).standalone()}</figure>",
        f"<h2>How concentrated it is</h2><figure>{svg_summary.mass_curve(summary).standalone()}</figure>"
        if summary.mass()
        else "",
        f"<h2>By {summary.by}</h2>{_rows_table(summary.columns, summary.records())}",
        f"<h2>How it was made</h2>{_made_table(summary.provenance)}" if summary.provenance else "",
    ]
    return _page(summary_text.headline(summary), sections)


def pruning_page(report: "FapmReport") -> str:
    """The page of what fapm kept."""
    from fisherkit.render import fapm_view, svg_fapm

    rows = [group.record() for group in fapm_view.energy_of(report).layers]
    sections = [
        *(f'<p class="alarm">{_safe(warning)}</p>' for warning in report.warnings),
        *(f"<p>{_safe(sentence)}</p>" for sentence in fapm_view.sentences(report)),
        f"<h2>Changes against weights</h2><figure>{svg_fapm.density(report.map).standalone()}</figure>"
        if report.map is not None
        else "",
        f"<h2>Where the kept part lies</h2><figure>{svg_fapm.layers(report).standalone()}</figure>",
        f"<h2>By layer</h2>{_rows_table(tuple(rows[0]), rows)}" if rows else "",
        f"<h2>How it was made</h2>{_made_table(report.provenance)}",
    ]
    return _page(fapm_view.headline(report), sections)


def _page(headline: str, sections: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><title>{_safe(headline)}</title><style>{_PAGE_STYLE}{svg.STYLE}</style>'
    size = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join([f"<h1>{_safe(headline)}</h1>", *sections])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{size}</head>\n<body>\n{body}\n</body></html>\n'


def _safe(text: object) -> str:
    return html.escape(formatting.printable(str(text)))


def _rows_table(columns: Sequence[str], records: Sequence[Record]) -> str:
    heads = "".join(f"<th>{_safe(column.replace('_', ' '))}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_figure(column, value)}</td>" for column, value in record.items()) + "</tr>"
        for record in records
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _figure(column: str, value: Value) -> str:
    if column in _SHARES and isinstance(value, float):
        return formatting.percent(value)
    return f"{value:,}" if isinstance(value, int) else _safe(formatting.number(value))


def _made_table(provenance: Mapping[str, object]) -> str:
    rows = formatting.provenance_rows(provenance)
    lines = "".join(f"<tr><td>{_safe(field)}</td><td>{_safe(text)}</td></tr>" for field, text in rows)
    return f'<table class="made">{lines}</table>'


# Writers


def _png(summary: Summary) -> bytes:
    _need_matplotlib()
    from fisherkit.render import png

    return png.summary_png(summary)


def _rows(form: str) -> Callable[[Summary], bytes]:
    return lambda summary: _encode(render(summary.records(), summary.columns, form))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")


_WRITERS: Mapping[str, Callable[[Summary], bytes]] = {
    ".html": lambda summary: _encode(page(summary)),
    ".svg": lambda summary: _encode(svg_summary.picture(summary)),
    ".png": _png,
    **{f".{form}": _rows(form) for form in ("csv", "tsv", "json", "jsonl")},
}
