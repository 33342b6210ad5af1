"""Drawings of two files show how the two differ: maps on one scale, a map of ratios or overlaps, layers by share."""

import json
import math
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from fisher_files import fisher_tensors, write_fisher
from torch import Tensor

from fisherkit.errors import OutputError
from fisherkit.methods.inspect.heat_map import ratios
from fisherkit.methods.inspect.summary import Summary, inspect
from fisherkit.render import pages, summary_text, svg_compare, svg_summary
from fisherkit.render.files import write_figure

NS = "{http://www.w3.org/2000/svg}"
SEVEN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
SEVEN += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def compared(folder: Path, here: dict[str, Tensor], there: dict[str, Tensor]) -> Summary:
    paths = [write_fisher(folder / f"{name}.safetensors", one) for name, one in (("here", here), ("there", there))]
    return inspect(*paths)


def masks(folder: Path, keep: float = 0.5) -> Summary:
    """Two masks of rows with the same quota for every tensor."""
    paths = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        flags = {
            f"model.layers.{layer}.{module}.weight": torch.randperm(40, generator=generator) < 40 * keep
            for layer in range(3)
            for module in SEVEN
        }
        paths.append(write_fisher(folder / f"mask-{seed}.safetensors", flags, statistics=False))
    return inspect(*paths)


def tips(text: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(text).iter(f"{NS}title")]  # noqa: S314  our own text


def fills(text: str, start: str) -> list[str]:
    """Colours of the cells whose tooltips start so."""
    cells = ET.fromstring(text).iter(f"{NS}rect")  # noqa: S314  our own text
    found = [(cell.get("fill", ""), cell.find(f"{NS}title")) for cell in cells]
    return [fill for fill, title in found if title is not None and (title.text or "").startswith(start)]


# Ratios


def test_a_factor_over_everything_is_no_difference_between_cells(tmp_path: Path) -> None:
    tensors = fisher_tensors()
    summary = compared(tmp_path, tensors, {name: 4 * tensor for name, tensor in tensors.items()})
    assert summary.other is not None
    found = ratios(summary.heat, summary.other.heat)
    assert found.overall == pytest.approx(-2)
    assert list(found.cells.values()) == pytest.approx([0] * 11, abs=1e-6)
    assert [found.level(*cell) for cell in found.cells] == pytest.approx([0.5] * 11, abs=1e-3)
    assert "0.2500 times that of" in (summary_text.ratio_sentence(summary) or "")


def test_ratios_equal_the_plain_definition(tmp_path: Path) -> None:
    here, there = fisher_tensors(), fisher_tensors(seed=1)
    summary = compared(tmp_path, here, there)
    assert summary.other is not None
    found = ratios(summary.heat, summary.other.heat)
    totals = [sum(float(tensor.double().sum()) for tensor in side.values()) for side in (here, there)]
    for (layer, module), value in found.cells.items():
        name = f"model.layers.{layer}.{module}.weight"
        plain = float(here[name].double().mean() / there[name].double().mean()) / (totals[0] / totals[1])
        assert value == pytest.approx(math.log2(plain), abs=1e-9)
    assert max(map(abs, found.cells.values())) == found.bound


def test_cells_that_one_side_lacks_have_no_ratio(tmp_path: Path) -> None:
    here, there = fisher_tensors(), fisher_tensors()
    here["model.layers.0.mlp.up_proj.weight"].zero_()
    del there["model.layers.1.mlp.up_proj.weight"]
    summary = compared(tmp_path, here, there)
    text = svg_summary.picture(summary)
    for layer in (0, 1):
        assert f"layer {layer}, mlp.up_proj: not in both, or all zero" in tips(text)
    assert len(fills(text, "layer 2, mlp.up_proj: ")) == 3


# Drawings


def test_two_files_draw_a_comparison_and_not_the_first_of_them(tmp_path: Path) -> None:
    summary = compared(tmp_path, fisher_tensors(), fisher_tensors(seed=1))
    text = svg_summary.picture(summary)
    assert text != svg_summary.picture(inspect(summary.path))
    for words in (
        "here.safetensors",
        "there.safetensors",
        "ratio of means, totals made equal",
        "layers by their share",
    ):
        assert words in text
    assert sum("times as much in" in tip for tip in tips(text)) == 11
    page = pages.page(summary)
    assert page.count("<svg ") == 3
    assert '<tr class="differs">' in page


def test_both_maps_have_one_scale(tmp_path: Path) -> None:
    here, there = fisher_tensors(), {name: 10 * tensor for name, tensor in fisher_tensors(seed=1).items()}
    there["model.layers.0.self_attn.q_proj.weight"] = here["model.layers.0.self_attn.q_proj.weight"]
    text = svg_summary.picture(compared(tmp_path, here, there))
    equal = fills(text, "layer 0, self_attn.q_proj: mean")
    assert len(equal) == 2
    assert len(set(equal)) == 1
    other = fills(text, "layer 0, self_attn.k_proj: mean")
    assert len(set(other)) == 2


def test_every_common_layer_is_a_point(tmp_path: Path) -> None:
    summary = compared(tmp_path, fisher_tensors(layers=5), fisher_tensors(layers=4, seed=1))
    drawing = svg_compare.scatter(summary)
    dots = [tip for tip in tips(f'<svg xmlns="{NS[1:-1]}">{drawing.body}</svg>') if tip.startswith("layer ")]
    assert [dot.partition(":")[0] for dot in dots] == [f"layer {layer}" for layer in range(4)]
    assert drawing.body.count("<circle") == 4


@pytest.mark.parametrize(
    ("low", "high", "count"), [(0.0011, 0.09, 5), (1e-6, 0.5, 6), (0.015, 0.045, 1), (0.011, 0.019, 0)]
)
def test_ticks_lie_between_the_ends(low: float, high: float, count: int) -> None:
    ticks = svg_compare.scatter_ticks(low, high)
    assert len(ticks) == count
    assert all(low <= tick <= high for tick in ticks)


def test_a_file_against_itself_is_drawn_too(tmp_path: Path) -> None:
    path = write_fisher(tmp_path / "fisher.safetensors")
    text = svg_summary.picture(inspect(path, path))
    assert "fisher.safetensors (the same)" in text
    assert sum("1 times as much" in tip for tip in tips(text)) == 11


def test_names_that_are_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        write_fisher(tmp_path / folder / "fisher.pt")
    summary = inspect(tmp_path / "old" / "fisher.pt", tmp_path / "new" / "fisher.pt")
    assert summary_text.pair_names(summary) == ("old/fisher.pt", "new/fisher.pt")


def test_the_drawing_stays_inside_its_frame(tmp_path: Path) -> None:
    summary = compared(tmp_path, fisher_tensors(), fisher_tensors(seed=1))
    for drawing in (*svg_compare.drawings(summary), svg_compare.maps(masks(tmp_path))):
        root = ET.fromstring(f'<svg xmlns="{NS[1:-1]}">{drawing.body}</svg>')  # noqa: S314  our own text
        for rect in root.iter(f"{NS}rect"):
            assert float(rect.get("x", "")) + float(rect.get("width", "")) <= drawing.width
            assert float(rect.get("y", "")) + float(rect.get("height", "")) <= drawing.height


def test_420_tensors_are_drawn_in_less_than_three_seconds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.{module}.weight" for layer in range(60) for module in SEVEN]
    sides = [{name: torch.rand(4, 8, generator=generator) for name in names} for _ in range(2)]
    summary = compared(tmp_path, *sides)
    began = time.process_time()
    assert svg_summary.picture(summary).count("<rect") > 3 * 420
    assert pages.page(summary).count("<rect") > 3 * 420
    assert time.process_time() - began < 3


# Masks


def test_masks_of_equal_quotas_show_where_they_overlap(tmp_path: Path) -> None:
    summary = masks(tmp_path)
    text = svg_summary.picture(summary)
    assert "layers by their share" not in text
    assert "overlap of what may change" in text
    assert not any("density" in tip for tip in tips(text))
    one, two = (torch.Generator().manual_seed(seed) for seed in range(2))
    flags = [torch.randperm(40, generator=generator) < 20 for generator in (one, two)]
    overlap = int((flags[0] & flags[1]).sum()) / int((flags[0] | flags[1]).sum())
    assert f"layer 0, self_attn.q_proj: overlap {overlap:.3f}, by chance 0.333" in tips(text)


def test_masks_of_other_quotas_show_their_densities_too(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.{module}.weight" for layer in range(2) for module in SEVEN]
    paths = [
        write_fisher(
            tmp_path / f"{side}.safetensors",
            {name: torch.arange(40) < 3 * (place + side) for place, name in enumerate(names)},
            statistics=False,
        )
        for side in (0, 1)
    ]
    text = svg_summary.picture(inspect(*paths))
    assert len(fills(text, "layer 1, mlp.down_proj: density")) == 2
    assert len(fills(text, "layer 1, mlp.down_proj: overlap")) == 1


# Files


@pytest.mark.parametrize("name", ["both.html", "both.svg", "both.png"])
def test_every_kind_of_file_draws_every_comparison(tmp_path: Path, name: str) -> None:
    if name.endswith("png"):
        pytest.importorskip("matplotlib")
    one_layer = {"model.layers.0.a.weight": torch.rand(2, 3)}
    outside = {"lm_head.weight": torch.rand(2, 3)}
    zeros = {"model.layers.0.a.weight": torch.zeros(2, 3)}
    for here, there in (
        (fisher_tensors(), fisher_tensors(seed=1)),
        (one_layer, one_layer),
        (outside, outside),
        (zeros, zeros),
    ):
        write_figure(compared(tmp_path, here, there), tmp_path / name, force=True)
        assert (tmp_path / name).stat().st_size > 1000
    write_figure(masks(tmp_path), tmp_path / name, force=True)


def test_neither_file_is_replaced_by_the_report(tmp_path: Path) -> None:
    summary = compared(tmp_path, fisher_tensors(), fisher_tensors(seed=1))
    before = (tmp_path / "there.json").read_text()
    with pytest.raises(OutputError, match="being inspected"):
        write_figure(summary, tmp_path / "there.json", force=True)
    assert json.loads((tmp_path / "there.json").read_text()) == json.loads(before)
