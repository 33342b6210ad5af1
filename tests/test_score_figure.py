"""The picture of score: every checkpoint at its place with its interval, the front through those that none beats."""

import html
import itertools
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import score_reports

from fisherkit.errors import MissingLibraryError, OptionError, OutputError
from fisherkit.kernels.front import front
from fisherkit.methods.score.report import ScoreReport
from fisherkit.render import files, pages, score_view, svg_score
from fisherkit.render.labels import Label, place_labels
from fisherkit.render.score_view import ticks

EVIL = '<script>alert("1")</script>&\x1b'
NS = "{http://www.w3.org/2000/svg}"
LOSSES = {
    "BASE": (2.00, 3.00),
    "FT": (2.50, 1.00),
    "fapm 0.1": (2.40, 1.05),
    "fapm 0.9": (2.02, 2.20),
    "random 0.9": (2.05, 2.70),
    "random 0.1": (2.60, 1.50),
}


@pytest.fixture
def report() -> ScoreReport:
    return score_reports.sweep(losses=LOSSES)


def root_of(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314  our own text


def dots(text: str) -> dict[str, tuple[float, float]]:
    """Centres of all points by what their tooltips begin with."""
    found = {}
    for circle in root_of(text).iter(f"{NS}circle"):
        title = circle.find(f"{NS}title")
        assert title is not None
        found[str(title.text).partition(":")[0]] = float(circle.get("cx", "")), float(circle.get("cy", ""))
    return found


def test_points_lie_where_their_losses_are(report: ScoreReport) -> None:
    places = dots(svg_score.picture(report))
    assert places.keys() == LOSSES.keys()
    for axis, sign in ((0, 1), (1, -1)):  # y grows downwards
        pixels = np.array([places[name][axis] for name in LOSSES])
        values = np.array([losses[axis] for losses in LOSSES.values()])
        slope, start = np.polyfit(values, pixels, 1)
        assert slope * sign > 0
        assert np.abs(slope * values + start - pixels).max() < 0.06


def test_tooltips_hold_exact_figures_and_intervals(report: ScoreReport) -> None:
    text = svg_score.picture(report)
    assert "fapm 0.9: old 2.02 (+0.02 ± 0.01), new 2.2 (-0.8 ± 0.01)" in text
    assert "BASE: old 2, new 3<" in text  # the first has no difference to itself


def test_bars_are_as_long_as_intervals(report: ScoreReport) -> None:
    text = svg_score.picture(report)
    paths = [path.get("d", "") for path in root_of(text).iter(f"{NS}path") if path.get("class") == "missing"]
    assert len(paths) == 2 * (len(LOSSES) - 1)
    (panel,) = score_view.panels(report)
    per_nat = svg_score.WIDTH / (panel.x_range[1] - panel.x_range[0])
    lengths = [[float(part) for part in re.split(r"[ML ]", path) if part] for path in paths]
    assert [c - a for a, b, c, d in lengths if b == d] == pytest.approx([0.02 * per_nat] * 5, abs=0.11)


def test_the_line_goes_through_the_front_and_nothing_lies_below_it(report: ScoreReport) -> None:
    (panel,) = score_view.panels(report)
    best = {list(LOSSES)[at] for at in front(list(LOSSES.values()))}
    assert {point.name for point in panel.points if point.is_best} == best == {"BASE", "FT", "fapm 0.1", "fapm 0.9"}
    assert {LOSSES[name] for name in best} <= set(panel.steps)
    for (a, b), (c, d) in itertools.pairwise(panel.steps):
        assert (a == c) != (b == d)  # right or down, never both
        assert a <= c
        assert b >= d
    corners = set(panel.steps) - {LOSSES[name] for name in best}
    assert all(any(x <= a and y <= b for x, y in LOSSES.values()) for a, b in corners)


def test_checkpoints_that_differ_in_a_number_share_a_colour(report: ScoreReport) -> None:
    (panel,) = score_view.panels(report)
    level = {point.name: point.level for point in panel.points}
    assert level["fapm 0.1"] == level["fapm 0.9"] is not None
    assert level["random 0.1"] == level["random 0.9"] not in (None, level["fapm 0.1"])
    assert level["BASE"] is level["FT"] is None


def test_one_set_is_drawn_as_rows_and_three_as_two_panels() -> None:
    one = score_reports.report({name: {"old": losses} for name, losses in LOSSES.items()})
    assert [panel.y_label for panel in score_view.panels(one)] == [""]
    heights = [y for _, y in dots(svg_score.picture(one)).values()]
    assert np.diff(heights) == pytest.approx([24.0] * (len(LOSSES) - 1))
    three = score_reports.report({n: {"old": v, "new": v[::-1], "more": v} for n, v in LOSSES.items()})
    assert [panel.y_label[:3] for panel in score_view.panels(three)] == ["new", "mor"]
    assert svg_score.picture(three).count("<circle") == 2 * len(LOSSES)


@pytest.mark.parametrize("ci95", [None, 0.0, 0.01])
def test_single_checkpoints_and_equal_losses_can_be_drawn(ci95: float | None) -> None:
    for names in (["a"], ["a", "b", "c"]):
        for sets in (["old"], ["old", "new"]):
            same = score_reports.report({name: dict.fromkeys(sets, (1.0, 0.5)) for name in names}, ci95=ci95)
            root_of(svg_score.picture(same))
            assert pages.score_page(same).count("<circle") == len(names)


def test_names_are_words_and_never_markup() -> None:
    evil = score_reports.report({EVIL: {EVIL: (1.0, 0), "new": (2.0, 0)}, "b": {EVIL: (1.5, 0), "new": (1.0, 0)}})
    for text in (svg_score.picture(evil, [EVIL]), pages.score_page(evil, [EVIL])):
        assert "<script>alert" not in text
        assert "\x1b" not in text
        assert html.escape('<script>alert("1")') in text
    root_of(svg_score.picture(evil, [EVIL]))


def test_the_page_has_a_row_for_every_checkpoint_and_set_and_refers_to_nothing_outside(report: ScoreReport) -> None:
    text = pages.score_page(report, ["advice"])
    assert text.count("<tr><td data-value=") == 2 * len(LOSSES)
    assert "<p>advice</p>" in text
    assert not re.search(r"(src|href)=|url\(|@import", text)


def test_everything_lies_inside_the_drawing(report: ScoreReport) -> None:
    drawing = svg_score.panel(score_view.panels(report)[0])
    for element in root_of(f'<svg xmlns="{NS[1:-1]}">{drawing.body}</svg>').iter(f"{NS}circle"):
        assert 0 <= float(element.get("cx", "")) <= drawing.width
        assert 0 <= float(element.get("cy", "")) <= drawing.height


def test_labels_keep_clear_of_each_other_and_of_points_and_lines() -> None:
    random = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in random.uniform((50, 20), (500, 380), (14, 2))]
    bars = [(x - 12, y, x + 12, y) for x, y in points]
    labels = place_labels(points, [f"fapm 0.{at}" for at in range(14)], bars, 620, 400)

    def meet(one: Label, left: float, top: float, right: float, bottom: float) -> bool:
        return one.left < right and left < one.left + one.width and one.top < bottom and top < one.top + 13

    for at, one in enumerate(labels):
        assert one.left >= 0
        assert one.left + one.width <= 620
        assert not any(meet(one, o.left, o.top, o.left + o.width, o.top + 13) for o in labels[:at])
        assert not any(meet(one, x - 4, y - 4, x + 4, y + 4) for x, y in points)
        assert not any(meet(one, *bar) for bar in bars)


@pytest.mark.parametrize(("low", "high"), [(2.0, 2.58), (0, 1), (-3e-5, 8e-5), (1e4, 5e5), (0.999, 1.001), (2.0, 2.0)])
def test_ticks_are_few_round_numbers_between_the_ends(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert all(len(f"{tick:g}") <= 7 for tick in found)
    assert high == low or len(found) >= 3
    steps = np.diff(found)
    assert steps == pytest.approx([steps[0]] * len(steps) if len(steps) else [])


def test_what_has_no_bytes_is_left_out_of_a_picture_in_bits() -> None:
    made = score_reports.sweep(losses=LOSSES)
    bits = ScoreReport(measure="bits_per_byte", sets=made.sets, checkpoints=made.checkpoints, made={})
    assert "bits per byte" in svg_score.picture(bits)
    assert dots(svg_score.picture(bits)).keys() == LOSSES.keys()


def test_files_are_what_their_suffix_says(report: ScoreReport, tmp_path: Path) -> None:
    files.write_score(report, tmp_path / "a.svg")
    files.write_score(report, tmp_path / "a.html", ["advice"])
    assert (tmp_path / "a.svg").read_text("utf-8") == svg_score.picture(report)
    assert (tmp_path / "a.html").read_text("utf-8") == pages.score_page(report, ["advice"])
    with pytest.raises(OptionError, match=r"a figure ends in \.html, \.svg or \.png"):
        files.write_score(report, tmp_path / "a.pdf")
    with pytest.raises(OutputError, match="there is no folder"):
        files.write_score(report, tmp_path / "no" / "a.svg")


def test_png_needs_matplotlib_and_is_made_with_it(report: ScoreReport, tmp_path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(MissingLibraryError, match="pip install matplotlib"):
            files.write_score(report, tmp_path / "a.png")
        return
    three = score_reports.report({n: {"old": v, "new": v[::-1], "m$o$re": v} for n, v in LOSSES.items()})
    for at, one in enumerate((report, three, score_reports.report({EVIL: {"old": (1.0, math.nan)}}))):
        files.write_score(one, tmp_path / f"{at}.png", ["advice $x$"])
        assert (tmp_path / f"{at}.png").read_bytes().startswith(b"\x89PNG")
