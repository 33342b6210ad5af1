"""Summaries, prunings and scores as files to look at or keep: ``.html``, ``.svg``, ``.png``, or rows as ``.csv``, ...

Files are written aside and renamed when whole.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fisherkit.checkpoint.atomic import write_bytes
from fisherkit.checkpoint.target import check_file
from fisherkit.errors import MissingLibraryError, OptionError, OutputError
from fisherkit.methods.inspect.records import render
from fisherkit.methods.inspect.summary import Summary

if TYPE_CHECKING:
    from fisherkit.methods.inspect.mask_bands import Bands
    from fisherkit.methods.merge.fapm_report import FapmReport
    from fisherkit.methods.merge.merge import MergeReport
    from fisherkit.methods.score.report import ScoreReport


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
    read = [summary.path, *([summary.comparison.path] if summary.comparison else [])]
    if target.resolve() in {path.resolve() for source in read for path in _inputs(source)}:
        raise OutputError(f"{target}: belongs to what is being inspected; choose another name")
    check_file(target, force=force)
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
    from fisherkit.render import pages, png_fapm, svg_fapm

    if suffix == ".png":
        return png_fapm.pruning_png(report)
    return _encode(svg_fapm.picture(report) if suffix == ".svg" else pages.pruning_page(report))


def solve_bytes(report: "MergeReport", suffix: str) -> bytes:
    """Return the figure of a merge that solved with covariances as the content of a file: ``.html`` or ``.svg``."""
    from fisherkit.render import pages, svg_solve

    return _encode(svg_solve.picture(report) if suffix == ".svg" else pages.solve_page(report))


def score_bytes(report: "ScoreReport", suffix: str, more: Sequence[str] = ()) -> bytes:
    """Return the picture of a score as the content of a file.

    Args:
        report: of score.
        suffix: ``.html``, ``.svg`` or ``.png``.
        more: sentences that belong to it, such as advice.
    """
    from fisherkit.render import pages, png_score, svg_score

    if suffix == ".png":
        return png_score.score_png(report, more)
    return _encode(svg_score.picture(report, more) if suffix == ".svg" else pages.score_page(report, more))


def write_score(report: "ScoreReport", target: Path, more: Sequence[str] = ()) -> None:
    """Draw a score, in place of what ``target`` holds: see check_figure, which asks before.

    Args:
        report: of score.
        target: ends in ``.html``, ``.svg`` or ``.png``.
        more: sentences that belong to it, such as advice.

    Raises:
        OptionError: another suffix.
        OutputError: ``target`` cannot be written.
        MissingLibraryError: ``.png`` without matplotlib.
    """
    check_figure(target, force=True)
    write_bytes(target, score_bytes(report, target.suffix.lower(), more))


def check_report(target: Path, *, force: bool) -> None:
    """Refuse a ``.json`` report that could not be written; raises OptionError or OutputError."""
    if target.suffix.lower() != ".json":
        raise OptionError(f"{target}: a report ends in .json")
    check_file(target, force=force)


def check_figure(target: Path, *, force: bool) -> None:
    """Refuse a figure that could not be drawn; raises OptionError, OutputError or MissingLibraryError."""
    if target.suffix.lower() not in (".html", ".svg", ".png"):
        raise OptionError(f"{target}: a figure ends in .html, .svg or .png")
    if target.suffix.lower() == ".png":
        _need_matplotlib()
    check_file(target, force=force)


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingLibraryError("matplotlib", "a .png report")


def _inputs(path: Path) -> Iterable[Path]:
    """Return an inspected file and what extract wrote beside it."""
    if path.is_dir():
        return (path, path / "fisher.json", path / "layer_importance.json")
    importance = (path.with_name("layer_importance.json"), path.with_name(f"{path.stem}.layer_importance.json"))
    return (path, path.with_suffix(".json"), *importance)


# Writers


def _page(summary: Summary) -> bytes:
    from fisherkit.render import pages

    return _encode(pages.page(summary, _bands(summary)))


def _svg(summary: Summary) -> bytes:
    from fisherkit.render import svg_summary

    return _encode(svg_summary.picture(summary, _bands(summary)))


def _png(summary: Summary) -> bytes:
    _need_matplotlib()
    from fisherkit.render import png

    return png.summary_png(summary, _bands(summary))


def _bands(summary: Summary) -> "tuple[Bands, ...]":
    """Return the insides of a mask, which only its drawings show; nothing for other files and for two masks."""
    if summary.kind != "mask" or summary.other is not None:
        return ()
    from fisherkit.methods.inspect.mask_bands import mask_bands

    return mask_bands(summary)


def _rows(form: str) -> Callable[[Summary], bytes]:
    return lambda summary: _encode(render(summary.records(), summary.columns, form))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")


_WRITERS: Mapping[str, Callable[[Summary], bytes]] = {
    ".html": _page,
    ".svg": _svg,
    ".png": _png,
    **{f".{form}": _rows(form) for form in ("csv", "tsv", "json", "jsonl")},
}
