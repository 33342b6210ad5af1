"""The figure of fapm: what it shows is what was kept, whatever was pruned and however it is called."""

import html
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fisherkit.errors import MissingLibraryError, OptionError, OutputError
from fisherkit.kernels.density import BINS, DensityMap
from fisherkit.methods.merge.fapm import fapm
from fisherkit.methods.merge.fapm_report import FapmReport
from fisherkit.options import FapmOptions
from fisherkit.render import fapm_view, files, pages, svg_fapm
from fisherkit.render.files import write_pruning

EVIL = 'model.layers.0.<script>alert("1")</script>&\x1b.weight'
NS = "{http://www.w3.org/2000/svg}"
SHAPES = {
    "model.embed_tokens.weight": (60, 16),
    "model.layers.0.self_attn.q_proj.weight": (64, 48),
    "model.layers.0.mlp.up_proj.weight": (32, 48),
    "model.layers.10.self_attn.q_proj.weight": (64, 48),
    "model.layers.2.self_attn.q_proj.weight": (64, 48),
    "model.layers.2.mlp.up_proj.weight": (32, 48),
    "model.norm.weight": (16,),
}
TensorPair = dict[str, np.ndarray]


def sides(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> tuple[TensorPair, TensorPair]:
    """Both sides: some entries unchanged, some zero, and ``model.layers.2.mlp.up_proj`` without any change."""
    rng = np.random.default_rng(0)
    base = {name: (0.02 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    tuned = {}
    for name, w in base.items():
        w[rng.random(w.shape) < 0.02] = 0
        d = (1e-3 * rng.standard_normal(w.shape)).astype(np.float32)
        d[rng.random(w.shape) < 0.1] = 0
        tuned[name] = w if name == "model.layers.2.mlp.up_proj.weight" else w + d
    return base, tuned


def prune(folder: Path, shapes: Mapping[str, tuple[int, ...]] = SHAPES, **options: Any) -> FapmReport:
    for name, tensors in zip(("base", "tuned"), sides(shapes), strict=True):
        (folder / name).mkdir(exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return fapm(folder / "base", folder / "tuned", None, FapmOptions(**options), figure=True)


@pytest.fixture
def report(tmp_path: Path) -> FapmReport:
    return prune(tmp_path)


def the_map(report: FapmReport) -> DensityMap:
    assert report.map is not None
    return report.map


def elements(text: str, name: str) -> list[ET.Element]:
    return list(ET.fromstring(text).iter(f"{NS}{name}"))  # noqa: S314  our own text


def tooltips(report: FapmReport) -> list[str]:
    return [element.text or "" for element in elements(svg_fapm.picture(report), "title")]


def cell(value: float) -> int:
    return min(max(math.floor(6 * (math.log2(value) + 8)), 0), BINS - 1)


def cuts(report: FapmReport) -> list[str]:
    return [curve.tooltip_text for curve in fapm_view.curves_of(the_map(report), fapm_view.window_of(the_map(report)))]


# The density


def test_every_entry_that_changed_is_in_its_cell(report: FapmReport) -> None:
    base, tuned = sides()
    expected = np.zeros((BINS, BINS))
    for name, row in report.tensors.items():
        w, d = np.abs(base[name]).ravel(), np.abs(tuned[name] - base[name]).ravel()
        mean, unit = w.mean(dtype=np.float64), row["threshold"]
        for one_w, one_d in zip(w.tolist(), d.tolist(), strict=True):
            if one_w and one_d:
                expected[cell(one_d / unit), cell(one_w / mean)] += 1
    found = the_map(report)
    assert found.entries.sum() == expected.sum()
    assert np.abs(found.entries - expected).sum() <= 4  # an entry on the border of two cells
    assert found.kept.sum() == report.totals["kept"]


@pytest.mark.parametrize(("density", "sign"), [(0.1, 1), (0.7, -1)])
def test_the_cut_parts_what_was_kept_from_the_rest(tmp_path: Path, density: float, sign: int) -> None:
    found = the_map(prune(tmp_path, density=density))
    assert (found.positive > 0, found.negative > 0) == (sign > 0, sign < 0)
    edges = 2 ** (np.arange(BINS + 1) / 6 - 8)
    with np.errstate(divide="ignore"):
        score = edges[:, None] * (1 - 1 / edges)  # [y, x], at the corners of cells
    corners = np.stack([score[:-1, :-1], score[1:, :-1], score[:-1, 1:], score[1:, 1:]])
    inside = slice(1, -1)  # the outermost cells hold what lies beyond them too
    best, worst = corners.max(axis=0)[inside, inside], corners.min(axis=0)[inside, inside]
    cells, chosen = found.entries[inside, inside], found.kept[inside, inside]
    assert (chosen[best < sign] == 0).all()
    assert (chosen[worst > sign] == cells[worst > sign]).all()
    assert chosen[worst > sign].sum() > 100


@pytest.mark.parametrize("metric", ["fapm", "magnitude", "relative"])
def test_the_line_lies_where_the_metric_equals_its_threshold(tmp_path: Path, metric: str) -> None:
    found = the_map(prune(tmp_path, metric=metric))
    window = fapm_view.window_of(found)
    (curve,) = fapm_view.curves_of(found, window)
    for x, y in ((2**x, 2**y) for x, y in curve.points):
        equal = {"fapm": y * (1 - 1 / x), "magnitude": y, "relative": y / x}[metric]
        assert equal == pytest.approx(1)
    (drawn,) = {line.get("points") for line in elements(svg_fapm.picture(prune(tmp_path, metric=metric)), "polyline")}
    assert len((drawn or "").split()) == len(curve.points) > 10


@pytest.mark.parametrize("metric", ["random", "wise-ft", "dare", "della"])
def test_metrics_without_a_cut_have_no_line(tmp_path: Path, metric: str) -> None:
    report = prune(tmp_path, metric=metric)
    text = svg_fapm.picture(report)
    assert not elements(text, "polyline")
    assert "mean |delta|" in text
    assert ("those that were kept" in text) == (metric == "random")


def test_thresholds_on_both_sides_of_zero_have_a_line_each(report: FapmReport) -> None:
    both = replace(report, map=replace(the_map(report), positive=3, negative=2))
    assert cuts(both) == [
        "the cut of 3 tensors, whose threshold is above 0",
        "the cut of 2 tensors, whose threshold is below 0",
    ]
    classes = [line.get("class") for line in elements(svg_fapm.picture(both), "polyline")]
    assert classes == ["halo", "cut", "halo", "cut second"] * 2


def test_tooltips_of_the_density_add_up(report: FapmReport) -> None:
    found = the_map(report)
    window = fapm_view.window_of(found)
    told = [re.fullmatch(r".*: about ([\d.]+)( k)? entries, (.*) % kept", tip) for tip in tooltips(report)]
    counts = [float(match[1]) * (1000 if match[2] else 1) for match in told if match]
    assert sum(counts) == pytest.approx(2 * found.entries[window.cells].sum(), rel=0.01)  # in both panels
    assert fapm_view.beyond(found, window) == pytest.approx(1 - found.entries[window.cells].sum() / found.entries.sum())
    assert 0 < fapm_view.beyond(found, window) < 0.022


def test_colours_are_the_same_in_both_panels(report: FapmReport) -> None:
    everything = replace(report, map=replace(the_map(report), kept=the_map(report).entries.copy()))
    filled = [
        path.get("d") for path in elements(svg_fapm.picture(everything), "path") if path.get("fill", "")[:1] == "#"
    ]
    assert len(filled) == 2 * len(set(filled)) > 10


def test_the_window_holds_the_origin_and_what_is_not_thin() -> None:
    empty = DensityMap()
    assert fapm_view.window_of(empty) == fapm_view.Window(-1, 1, -1, 1)
    assert fapm_view.beyond(empty, fapm_view.window_of(empty)) == 0
    far = DensityMap()
    far.entries[0, BINS - 1] = 5
    assert fapm_view.window_of(far) == fapm_view.Window(-1, 8, -8, 1)
    thin = DensityMap()
    thin.entries[48, 48], thin.entries[0, 0], thin.entries[BINS - 1, BINS - 1] = 10_000, 10, 10
    window = fapm_view.window_of(thin)
    assert (window.left, window.top) == (-1, 1)
    assert fapm_view.beyond(thin, window) == pytest.approx(20 / 10_020)


def test_powers_of_two_are_written_as_such() -> None:
    assert [fapm_view.power(exponent) for exponent in (-8, -1, 0, 1, 12)] == ["2⁻⁸", "2⁻¹", "1", "2¹", "2¹²"]
    assert fapm_view.ticks(-3, 2) == [-2, 0, 2]


# Kept energy


def test_energy_is_that_of_the_tensors_taken_together(report: FapmReport) -> None:
    energy = fapm_view.energy_of(report)
    assert [group.layer for group in energy.layers] == [0, 2, 10, None, None]
    assert [group.name for group in energy.layers[3:]] == ["model.embed_tokens", "model.norm"]
    first = [row for name, row in report.tensors.items() if ".layers.0." in name]
    left = sum(row["energy"] * row["energy_kept"] for row in first)
    assert energy.layers[0].share == pytest.approx(left / sum(row["energy"] for row in first))
    assert sum(group.kept for group in energy.layers) == report.totals["kept"]
    assert energy.bounds is not None
    assert 0 < energy.bounds[0] < energy.bounds[1] <= 1
    levels = [energy.level(layer, module) for layer, module in energy.cells]
    assert {0.0, 1.0, None} < set(levels)


def test_small_tensors_do_not_set_the_scale() -> None:
    def group(weights: int, left: float) -> fapm_view.Group:
        return fapm_view.Group("layer 0, a", 0, 1, weights, 1, 1.0, left)

    cells = {
        (0, "q"): group(1000, 0.2),
        (0, "up"): group(500, 0.4),
        (0, "norm"): group(9, 0.9),
        (0, "bias"): group(9, 0),
    }
    energy = fapm_view.Energy((), cells)
    assert energy.bounds == (0.2, 0.4)
    assert [energy.level(*cell) for cell in cells] == [0, 1, 1, 0]
    assert energy.measure.endswith("; small tensors lie beyond too")
    alike = fapm_view.Energy((), {(0, "q"): group(10, 0.5), (1, "q"): group(10, 0.5)})
    assert (alike.level(0, "q"), alike.measure) == (1, "share of the squared delta kept")


def test_every_tensor_has_its_figures_in_a_tooltip(report: FapmReport) -> None:
    told = tooltips(report)
    row = report.tensors["model.layers.10.self_attn.q_proj.weight"]
    share = f"{100 * row['energy_kept']:.1f} %"
    assert f"layer 10, self_attn.q_proj: {share} of the squared delta kept, in 307 of 3,072 entries" in told
    assert "layer 10, mlp.up_proj: no such tensor" in told
    assert "layer 2, mlp.up_proj: fine-tuning changed nothing" in told


def test_a_delta_without_energy_draws_nothing_but_marks(report: FapmReport) -> None:
    rows = {name: row | {"energy": 0.0, "energy_kept": 0.0, "kept": 0} for name, row in report.tensors.items()}
    nothing = replace(report, tensors=rows, map=DensityMap())
    assert fapm_view.energy_of(nothing).bounds is None
    assert tooltips(nothing).count("layer 0, mlp.up_proj: fine-tuning changed nothing") == 1
    assert not elements(svg_fapm.picture(nothing), "polyline")


# Files


@pytest.mark.parametrize("name", ["a.html", "a.svg", "a.png"])
@pytest.mark.parametrize("metric", ["fapm", "random", "wise-ft"])
def test_every_metric_has_every_kind_of_figure(tmp_path: Path, metric: str, name: str) -> None:
    if name.endswith("png"):
        pytest.importorskip("matplotlib")
    report = prune(tmp_path, metric=metric)
    outside = {key: shape for key, shape in SHAPES.items() if ".layers." not in key}
    for one in (report, replace(report, map=None), replace(report, map=DensityMap()), prune(tmp_path, outside)):
        write_pruning(one, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 2000
    assert not list(tmp_path.glob(".*partial"))


def test_the_page_is_self_contained_and_says_what_was_done(report: FapmReport, tmp_path: Path) -> None:
    write_pruning(replace(report, warnings=("look here",)), tmp_path / "fapm.html")
    text = (tmp_path / "fapm.html").read_text()
    for outside in ("http", "@import", "url(", "src=", "href=", "fetch(", "import("):
        assert outside not in text
    assert text.count("<script>") == text.count("<script") == 1
    assert "prefers-color-scheme: dark" in text
    assert '<p class="alarm">look here</p>' in text
    assert f"{report.totals['kept']:,} of {report.totals['weights']:,} entries" in text
    assert "In every tensor, those entries were kept with the highest S" in text
    assert text.count("<svg ") == 2
    for group in fapm_view.energy_of(report).layers:
        assert f">{group.name}</td>" in text


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    report = prune(tmp_path, {EVIL: (8, 9), "model.layers.1.a.weight": (8, 9)})
    for text in (pages.pruning_page(report), svg_fapm.picture(report)):
        assert 'alert("1")' not in text
        assert "\x1b" not in text
        assert html.escape("<script>") in text
    assert tooltips(report)


def test_the_drawing_stays_inside_its_frame(report: FapmReport) -> None:
    for drawing in (svg_fapm.layers(report), svg_fapm.density(the_map(report))):
        for rect in elements(f'<svg xmlns="{NS[1:-1]}">{drawing.body}</svg>', "rect"):
            assert float(rect.get("x", "")) + float(rect.get("width", "")) <= drawing.width
            assert float(rect.get("y", "")) + float(rect.get("height", "")) <= drawing.height


def test_what_cannot_be_drawn_is_one_line(report: FapmReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"\.html, \.svg or \.png"):
        write_pruning(report, tmp_path / "figure.pdf")
    with pytest.raises(OutputError, match=r"no folder .*nowhere"):
        write_pruning(report, tmp_path / "nowhere" / "figure.svg")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match="'matplotlib'"):
        write_pruning(report, tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Sparsity 0.9 (the default), metric fapm."),
        ({"sparsity": 0.7}, "Sparsity 0.7, metric fapm."),
        ({"density": 0.3, "metric": "magnitude"}, "Sparsity 0.7, metric magnitude."),
    ],
)
def test_every_kind_of_figure_states_the_sparsity(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    report = prune(tmp_path, **options)
    assert fapm_view.asked_for(report) == said
    assert said in pages.pruning_page(report)
    assert said in svg_fapm.picture(report)


def test_modules_stand_in_the_models_order(report: FapmReport) -> None:
    rows = dict(sorted(report.tensors.items()))
    assert fapm_view.energy_of(replace(report, tensors=rows)).modules[:2] == ("self_attn.q_proj", "mlp.up_proj")
