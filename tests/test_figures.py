import csv
import html
import io
import json
import re
import stat
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from fisher_files import fisher_tensors, write_fisher

from fisherkit.errors import MissingLibraryError, OptionError, OutputError
from fisherkit.methods.inspect.summary import Summary, inspect
from fisherkit.render import files, formatting, pages, svg_summary
from fisherkit.render.files import write_figure

EVIL = 'model.layers.0.<script>alert("1")</script>&\x00\x1b.weight'
NS = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    tensors = fisher_tensors() | {"model.embed_tokens.weight": torch.rand(3, 5)}
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    return inspect(write_fisher(tmp_path / "fisher.safetensors", tensors))


def tooltips(text: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(text).iter(f"{NS}title")]  # noqa: S314  our own text


def test_the_drawing_has_a_cell_for_every_tensor_and_a_bar_for_every_layer(summary: Summary) -> None:
    told = tooltips(svg_summary.picture(summary))
    for (layer, module), mean in summary.heat.means.items():
        told_mean = "all zero" if mean == 0 else "mean"
        assert sum(tip.startswith(f"layer {layer}, {module}: {told_mean}") for tip in told) == 1
    assert "layer 2, self_attn.v_proj: no such tensor" in told
    assert "layer 1, mlp.up_proj: all zero" in told
    for row in summary.layers:
        assert any(tip.startswith(f"{row.name}: sum") for tip in told)


def test_bars_are_as_long_as_their_shares(summary: Summary) -> None:
    root = ET.fromstring(svg_summary.picture(summary))  # noqa: S314  our own text
    bars = [float(element.get("width", "")) for element in root.iter(f"{NS}rect") if element.get("class") == "bar"]
    shares = [row.share for row in summary.layers]
    assert len(bars) == len(shares)
    assert bars == pytest.approx([max(0.5, 240 * share / max(shares)) for share in shares], abs=0.06)


def test_the_drawing_stays_inside_its_frame(summary: Summary) -> None:
    drawing = svg_summary.layers(summary)
    root = ET.fromstring(f'<svg xmlns="{NS[1:-1]}">{drawing.body}</svg>')  # noqa: S314  our own text
    for element in root.iter(f"{NS}rect"):
        assert float(element.get("x", "")) + float(element.get("width", "")) <= drawing.width
        assert float(element.get("y", "")) + float(element.get("height", "")) <= drawing.height


def test_the_page_is_self_contained(summary: Summary, tmp_path: Path) -> None:
    write_figure(summary, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for outside in ("http", "@import", "url(", "src=", "href=", "fetch(", "import("):
        assert outside not in text
    assert text.count("<script>") == text.count("<script") == 1
    assert "prefers-color-scheme: dark" in text
    assert "200 prompts (builtin)" in text
    assert "estimator.name" in text
    assert text.count("<svg ") == 2
    known = formatting.provenance_rows(summary.provenance or {})
    assert text.count("<tr>") == 1 + len(summary.rows) + len(known)


def test_tables_sort_by_exact_numbers_and_back_to_the_models_order(summary: Summary) -> None:
    text = pages.page(summary)
    (table,) = re.findall(r'<table class="sortable">(.*?)</table>', text, re.DOTALL)
    assert re.findall(r'<th><button type="button">(.*?)</button></th>', table) == list(summary.columns)
    for place, (line, record) in enumerate(zip(table.splitlines()[1:], summary.records(), strict=False)):
        values = re.findall(r'<td data-value="(.*?)">', line)
        assert values[0] == str(place)
        exact = ["" if value is None else repr(value) for value in list(record.values())[1:]]
        assert values[1:] == exact


def test_drawings_shrink_and_then_scroll_in_a_narrow_window(summary: Summary) -> None:
    text = pages.page(summary)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    widths = re.findall(r'<section style="--wide: (\d+)px">', text)
    assert widths == re.findall(r'<figure><svg viewBox="0 0 (\d+) ', text)
    assert len(widths) == 2


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    summary = inspect(write_fisher(tmp_path / "fisher.pt", {EVIL: torch.ones(2, 3)}), by="tensor")
    for text in (pages.page(summary), svg_summary.picture(summary)):
        assert 'alert("1")' not in text
        assert "\x00" not in text
        assert "\x1b" not in text
        assert html.escape("<script>") in text
    assert tooltips(svg_summary.picture(summary))


def test_rows_as_files_are_exact(summary: Summary, tmp_path: Path) -> None:
    for name in ("rows.csv", "rows.tsv", "rows.json", "rows.jsonl"):
        write_figure(summary, tmp_path / name)
    assert json.loads((tmp_path / "rows.json").read_text()) == summary.records()
    read = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
    assert [float(row["sum"]) for row in read] == [row.sum for row in summary.rows]


def test_png_is_drawn_through_matplotlib(summary: Summary, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_figure(summary, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_png_without_matplotlib_says_what_to_install(
    summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=r"\.png.*'matplotlib'"):
        write_figure(summary, tmp_path / "report.png")


@pytest.mark.parametrize("name", ["report.html", "report.svg", "report.png"])
def test_every_kind_of_file_has_a_figure(tmp_path: Path, name: str) -> None:
    if name.endswith("png"):
        pytest.importorskip("matplotlib")
    (tmp_path / "layer_importance.json").write_text("[1, 3]")
    flags = {f"model.layers.{i}.a.weight": torch.arange(4) > i for i in range(3)}
    zeros = {"model.layers.0.a.weight": torch.zeros(2, 2)}
    for source in (
        tmp_path / "layer_importance.json",
        write_fisher(tmp_path / "mask.safetensors", flags, statistics=False),
        write_fisher(tmp_path / "zeros.pt", zeros),
    ):
        write_figure(inspect(source), tmp_path / name, force=True)
        assert (tmp_path / name).stat().st_size > 500


def test_an_existing_file_is_kept_unless_forced(summary: Summary, tmp_path: Path) -> None:
    target = tmp_path / "report.svg"
    target.write_text("mine")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        write_figure(summary, target)
    assert target.read_text() == "mine"
    write_figure(summary, target, force=True)
    assert target.read_text().startswith("<?xml")
    assert not list(tmp_path.glob(".*partial"))
    assert stat.S_IMODE(target.stat().st_mode) & stat.S_IRUSR


def test_what_is_inspected_is_never_replaced(summary: Summary, tmp_path: Path) -> None:
    for name in ("fisher.json", "layer_importance.json"):
        with pytest.raises(OutputError, match="being inspected"):
            write_figure(summary, tmp_path / name, force=True)


@pytest.mark.parametrize("name", ["report", "report.pdf", "report.html.gz"])
def test_an_unknown_suffix_lists_those_that_are_known(summary: Summary, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"\.html, \.svg, \.png, \.csv, \.tsv, \.json, \.jsonl"):
        write_figure(summary, tmp_path / name)


def test_a_folder_that_is_not_there_is_one_line(summary: Summary, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no folder .*nowhere"):
        write_figure(summary, tmp_path / "nowhere" / "report.html")
