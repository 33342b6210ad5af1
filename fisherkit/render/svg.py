"""Pieces of SVG, written by hand: elements, text, colours, and a whole file around drawings.

Drawings are text without outside references. Colours of text and lines follow the reader's light or dark setting; names
are escaped; exact figures are in tooltips. Lengths are in pixels.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fisherkit.render import formatting

STYLE = """
svg { font: 11px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; --ink: #1b1f24; --dim: #68707a; --line: #d5d9de;
  --paper: #ffffff; --bar: #31688e; --alarm: #c62828; --cut: #d81b60; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ed; --dim: #9aa3ad; --line: #3a4048; --paper: #16191d;
  --bar: #35b779; --alarm: #ff7b72; --cut: #ff6090; } }
svg text { fill: var(--ink); } svg text.dim { fill: var(--dim); } svg text.head { font-weight: 600; }
svg .paper { fill: var(--paper); } svg .bar { fill: var(--bar); } svg .line { stroke: var(--line); fill: none; }
svg .curve { stroke: var(--bar); stroke-width: 2; fill: none; } svg .missing { stroke: var(--dim); fill: none; }
svg rect { shape-rendering: crispEdges; } svg .dead { stroke: var(--alarm); fill: none; }
svg .alone { fill: var(--ink); } svg .cells { shape-rendering: crispEdges; } svg .shade { fill: var(--line); }
svg .halo { stroke: var(--paper); stroke-width: 4; stroke-opacity: .7; fill: none; }
svg .cut { stroke: var(--cut); stroke-width: 2; fill: none; } svg .second { stroke-dasharray: 6 4; }
svg .dot { stroke: var(--dim); stroke-width: .7; } svg .equal { stroke: var(--dim); stroke-dasharray: 3 3; }
"""
LETTER = 6.2
"""Mean width of a letter at 11 px."""

Colours = Callable[[float], formatting.RGB]
"""Colour of a level from 0 to 1."""


@dataclass(frozen=True)
class Drawing:
    """SVG elements and the size they take up, from (0, 0)."""

    body: str
    width: float
    height: float

    def standalone(self) -> str:
        """Return it as an ``<svg>`` element without style or background: what goes into a page that has STYLE."""
        size = {"width": f"{self.width:.0f}", "height": f"{self.height:.0f}"}
        return tag("svg", self.body, viewBox=f"0 0 {self.width:.0f} {self.height:.0f}", **size)


def picture(headline: str, parts: Sequence[Drawing], sentences: Sequence[str] = ()) -> str:
    """Return a whole ``.svg`` file: the headline, sentences under it, and the drawings below each other."""
    pad, top = 16.0, 44.0
    widest = max((len(sentence) for sentence in sentences), default=0) * LETTER
    width = max([widest, 7.0 * len(headline), *(part.width for part in parts)]) + 2 * pad
    body = text(pad, 26, headline, css="head")
    for sentence in sentences:
        body += text(pad, top, sentence, css="dim")
        top += 18
    for part in parts:
        body += tag("g", part.body, transform=f"translate({pad:g} {top:g})")
        top += part.height + 24
    whole = Drawing(tag("style", STYLE) + tag("rect", css="paper", width="100%", height="100%") + body, width, top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + whole.standalone().replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )


def tag(name: str, inside: str = "", css: str = "", **attributes: object) -> str:
    """Return an element; ``inside`` is markup, attributes are escaped."""
    given = ({"class": css} if css else {}) | attributes
    listed = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    return f"<{name}{listed}>{inside}</{name}>"


def tooltip(tooltip_text: str) -> str:
    """Return the element that holds what another says when pointed at."""
    return f"<title>{html.escape(formatting.printable(tooltip_text))}</title>" if tooltip_text else ""


def text(x: float, y: float, words: str, *, css: str = "", title: str = "", **attributes: object) -> str:
    """Return words, from their base line's left end; escaped."""
    inside = tooltip(title) + html.escape(formatting.printable(words))
    return tag("text", inside, css, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def line(x1: float, y1: float, x2: float, y2: float, css: str = "line") -> str:
    """Return a thin line, as of a grid."""
    return tag("path", css=css, d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")


def scale(x: float, y: float, low: str, high: str, measure: str, colours: Colours = formatting.colour) -> str:
    """Return a strip of all colours between the two ends that they stand for."""
    start = x + LETTER * len(low) + 8
    strip = "".join(
        tag("rect", x=f"{start + 3 * step:.1f}", y=f"{y:.1f}", width=3, height=15, fill=colour(step / 39, colours))
        for step in range(40)
    )
    return text(x, y + 11, low) + strip + text(start + 126, y + 11, f"{high}   {measure}")


def colour(level: float, colours: Colours = formatting.colour) -> str:
    """Return the colour of a level from 0 to 1 as hexadecimal digits."""
    red, green, blue = colours(level)
    return f"#{red:02x}{green:02x}{blue:02x}"
