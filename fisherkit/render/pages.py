"""Pages of HTML: one file each, without outside references, so that they open anywhere and years from now.

A page follows the reader's light or dark setting and the width of the window. Its one script sorts tables; without it
all else is there.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fisherkit.methods.inspect.records import Record, Value
from fisherkit.methods.inspect.summary import Summary
from fisherkit.render import formatting, summary_text, svg, svg_compare, svg_summary
from fisherkit.render.svg import Drawing

if TYPE_CHECKING:
    from fisherkit.methods.inspect.mask_bands import Bands
    from fisherkit.methods.merge.fapm_report import FapmReport
    from fisherkit.methods.merge.merge import MergeReport
    from fisherkit.methods.score.report import ScoreReport

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #68707a; --line: #d5d9de; --paper: #ffffff; --alarm: #c62828; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa3ad; --line: #3a4048; --paper: #16191d;
  --alarm: #ff7b72; } }
body { font: 14px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1500px; margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 3rem) 3rem; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { max-width: 80ch; margin: .7rem 0; overflow-wrap: anywhere; }
p.dim { color: var(--dim); } p.alarm { color: var(--alarm); font-weight: 600; }
.drawings { display: flex; flex-wrap: wrap; column-gap: 3rem; }
.drawings section { flex: 0 1 var(--wide); min-width: 0; }
figure { margin: 0; overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; min-width: min(var(--wide), 34rem); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem 0 .15rem 1.1rem; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0;
  position: sticky; left: 0; background: var(--paper); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; outline-offset: 2px; }
th button::after { content: " \\2195"; opacity: .35; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
table.made td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
table.made tr.differs td { font-weight: 600; }
table.made th { text-align: left; }
"""

# Clicking a column sorts by it, numbers downwards first; what has no value stays last. The column of names holds the
# rows' places, so that it brings the model's order back.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const first = column ? "descending" : "ascending", second = column ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = row => row.cells[column].dataset.value;
    body.append(...[...body.rows].sort((a, b) =>
      (value(a) === "") - (value(b) === "") || sign * (value(a) - value(b))));
  }));
}
"""

_SHARES = ("share", "energy_kept")


def page(summary: Summary, bands: "Sequence[Bands]" = ()) -> str:
    """Return the page of a summary.

    Args:
        summary: of one file, or of the comparison of two.
        bands: of a mask, see mask_bands.
    """
    sections = [
        f'<p class="dim">{_safe(" against ".join(_paths(summary)))}</p>',
        *(f'<p class="alarm">{_safe(warning)}</p>' for warning in summary_text.warnings(summary)),
        *(f'<p class="dim">{_safe(note)}</p>' for note in summary.notes),
        *(f"<p>{_safe(sentence)}</p>" for sentence in summary_text.sentences(summary, bands=bool(bands))),
        _drawings(_summary_drawings(summary, bands)),
        f"<h2>By {summary.by}</h2>{_rows_table(summary.columns, summary.records())}",
        _made(summary),
    ]
    return _page(summary_text.headline(summary), sections)


def _paths(summary: Summary) -> list[str]:
    return [str(summary.path), *([str(summary.comparison.path)] if summary.comparison else [])]


def _summary_drawings(summary: Summary, bands: "Sequence[Bands]") -> list[tuple[str, Drawing]]:
    drawings: list[tuple[str, Drawing]] = []
    if summary.other is not None:
        drawings.append(("Side by side", svg_compare.maps(summary)))
        if svg_compare.has_scatter(summary):
            drawings.append(("Layer by layer", svg_compare.scatter(summary)))
    elif not (bands and summary.heat.is_flat):
        drawings.append(("Where it lies", svg_summary.layers(summary)))
    if bands:
        from fisherkit.render import svg_bands

        drawings.append(("Inside of the tensors", svg_bands.bands(bands)))
    return drawings + ([("How concentrated it is", svg_summary.mass_curve(summary))] if summary.mass() else [])


def pruning_page(report: "FapmReport") -> str:
    """Return the page of what fapm kept."""
    from fisherkit.render import fapm_view, svg_fapm

    rows = [group.record() for group in fapm_view.energy_of(report).layers]
    drawings = [("Changes against weights", svg_fapm.density(report.map))] if report.map is not None else []
    sections = [
        *(f'<p class="alarm">{_safe(warning)}</p>' for warning in report.warnings),
        *(f"<p>{_safe(sentence)}</p>" for sentence in fapm_view.sentences(report)),
        _drawings([*drawings, ("Where the kept part lies", svg_fapm.layers(report))]),
        f"<h2>By layer</h2>{_rows_table(tuple(rows[0]), rows)}" if rows else "",
        f"<h2>How it was made</h2>{_made_table([report.provenance])}",
    ]
    return _page(fapm_view.headline(report), sections)


def solve_page(report: "MergeReport") -> str:
    """Return the page of a merge that solved with covariances."""
    from fisherkit.render import svg_solve

    rows = svg_solve.records(report)
    drawings = [
        ("What the filter keeps of each weight's delta", svg_solve.gains(report)),
        ("What each layer keeps", svg_solve.layers(report)),
    ]
    sections = [
        *(f'<p class="alarm">{_safe(warning)}</p>' for warning in report.warnings),
        *(f"<p>{_safe(sentence)}</p>" for sentence in svg_solve.sentences(report)),
        _drawings(drawings),
        f"<h2>By layer</h2>{_rows_table(tuple(rows[0]), rows)}" if rows else "",
        f"<h2>How it was made</h2>{_made_table([report.provenance])}",
    ]
    return _page(svg_solve.headline(report), sections)


def score_page(report: "ScoreReport", more: Sequence[str] = ()) -> str:
    """Return the page of a score.

    Args:
        report: of score.
        more: sentences that belong to it, such as advice.
    """
    from fisherkit.render import score_view, svg_score

    rows = [{column: record[column] for column in report.columns} for record in report.records()]
    titles = list(report.sets)[1:] or list(report.sets)
    drawings = [
        (f"{next(iter(report.sets))} against {name}" if len(report.sets) > 1 else name, svg_score.panel(one))
        for name, one in zip(titles, score_view.panels(report), strict=True)
    ]
    sections = [
        *(f"<p>{_safe(sentence)}</p>" for sentence in score_view.sentences(report, more)),
        _drawings(drawings),
        f"<h2>By checkpoint</h2>{_rows_table(report.columns, rows)}",
        f"<h2>How it was made</h2>{_made_table([{**report.made, 'prompts': dict(report.sets)}])}",
    ]
    return _page(score_view.headline(report), sections)


def _page(headline: str, sections: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><title>{_safe(headline)}</title><style>{_STYLE}{svg.STYLE}</style>'
    size = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join([f"<h1>{_safe(headline)}</h1>", *sections, f"<script>{_SCRIPT}</script>"])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{size}</head>\n<body>\n{body}\n</body></html>\n'


def _drawings(drawings: Iterable[tuple[str, Drawing]]) -> str:
    """Put drawings beside each other as far as the window is wide enough; each shrinks, then scrolls."""
    sections = (
        f'<section style="--wide: {drawing.width:.0f}px"><h2>{_safe(title)}</h2>'
        f"<figure>{drawing.standalone()}</figure></section>"
        for title, drawing in drawings
    )
    return f'<div class="drawings">{"".join(sections)}</div>'


def _safe(text: object) -> str:
    return html.escape(formatting.printable(str(text)))


# Tables


def _rows_table(columns: Sequence[str], records: Sequence[Record]) -> str:
    heads = "".join(f'<th><button type="button">{_safe(column.replace("_", " "))}</button></th>' for column in columns)
    body = "\n".join(f"<tr>{_row(record, place)}</tr>" for place, record in enumerate(records))
    return _scrolling("sortable", f"<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody>")


def _scrolling(css: str, inside: str) -> str:
    return f'<div class="scroll"><table class="{css}">{inside}</table></div>'


def _row(record: Record, place: int) -> str:
    cells = []
    for at, (column, value) in enumerate(record.items()):
        exact = place if at == 0 else value if isinstance(value, int | float) else ""
        cells.append(f'<td data-value="{exact}">{_figure(column, value)}</td>')
    return "".join(cells)


def _figure(column: str, value: Value) -> str:
    if column in _SHARES and isinstance(value, float):
        return formatting.percent(value)
    return f"{value:,}" if isinstance(value, int) else _safe(formatting.number(value))


def _made(summary: Summary) -> str:
    """Return how one file was made, or both beside each other with the differences in bold."""
    known = [summary.provenance] if summary.other is None else [summary.provenance, summary.other.provenance]
    if not any(known):
        return ""
    if summary.other is None:
        return f"<h2>How it was made</h2>{_made_table(known)}"
    return f"<h2>How they were made</h2>{_made_table(known, summary_text.pair_names(summary))}"


def _made_table(provenances: Sequence[Mapping[str, Any] | None], names: Sequence[str] = ()) -> str:
    sides = [dict(formatting.provenance_rows(provenance or {})) for provenance in provenances]
    heads = "".join(f"<th>{_safe(name)}</th>" for name in ("", *names))
    lines = [f"<tr>{heads}</tr>"] if names else []
    for field in dict.fromkeys(field for side in sides for field in side):
        texts = [side.get(field, "") for side in sides]
        css = ' class="differs"' if len(set(texts)) > 1 else ""
        lines.append(f"<tr{css}><td>{_safe(field)}</td>{''.join(f'<td>{_safe(text)}</td>' for text in texts)}</tr>")
    return _scrolling("made", "".join(lines))
