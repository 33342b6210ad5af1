"""Many layers fold into groups on a terminal: the same sums over fewer rows."""

import io
import math
from pathlib import Path

import pytest
import torch
from fisher_files import fisher_tensors, write_fisher
from rich.console import Console

from fisherkit.methods.inspect.summary import Summary, inspect
from fisherkit.render import terminal


def summary_of(folder: Path, layers: int, **more: torch.Tensor) -> Summary:
    tensors = fisher_tensors(layers=layers) | {name.replace("/", "."): tensor for name, tensor in more.items()}
    return inspect(write_fisher(folder / "fisher.safetensors", tensors))


def drawn(summary: Summary, *, every: bool = False) -> str:
    screen = Console(width=80, file=io.StringIO(), color_system=None)
    terminal.draw(summary, screen, every=every)
    return screen.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


@pytest.mark.parametrize("layers", [25, 60, 61, 80])
def test_folded_rows_add_up_to_the_same(tmp_path: Path, layers: int) -> None:
    summary = summary_of(tmp_path, layers)
    folded = summary.folded(12)
    assert len(folded.rows) <= 12
    for figure in ("tensors", "weights", "zeros"):
        assert sum(getattr(row, figure) for row in folded.rows) == getattr(summary.total, figure)
    assert math.fsum(row.sum for row in folded.rows) == pytest.approx(summary.total.sum, rel=1e-12)
    assert math.fsum(row.share for row in folded.rows) == pytest.approx(1)
    assert [row.layer for row in folded.rows] == sorted({row.layer for row in folded.rows})
    assert folded.rows[0].layer == 0
    assert folded.rows[-1].last_layer == layers - 1


def test_cells_of_a_folded_map_are_means_over_all_of_its_weights(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, 60)
    folded = summary.folded(12)
    first = [entry for entry in summary.entries if (entry.layer or 0) < 5 and entry.module == "mlp.up_proj"]
    expected = math.fsum(entry.sum for entry in first) / sum(entry.weights for entry in first)
    assert folded.heat.means[0, "mlp.up_proj"] == expected
    assert [folded.heat.label(layer) for layer in folded.heat.layers[:2]] == ["0-4", "5-9"]
    assert folded.heat.modules == summary.heat.modules


@pytest.mark.parametrize("layers", [1, 3, 24])
def test_few_layers_stay_as_they_are(tmp_path: Path, layers: int) -> None:
    summary = summary_of(tmp_path, layers)
    assert summary.folded(12) is summary


def test_only_layers_fold_and_what_lies_outside_keeps_its_row(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, 60, **{"lm_head/weight": torch.ones(2, 2)})
    assert summary.folded(12).rows[-1].name == "lm_head"
    by_module = inspect(summary.path, by="module")
    assert by_module.folded(12) is by_module


def test_agreement_of_a_group_is_that_of_its_tensors(tmp_path: Path) -> None:
    path = summary_of(tmp_path, 30).path
    summary = inspect(path, path).folded(12)
    assert [row.agreement.rank_correlation for row in summary.rows if row.agreement] == pytest.approx([1.0] * 10)


def test_a_terminal_shows_groups_and_every_layer_on_demand(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, 60)
    text = drawn(summary)
    assert len(text.splitlines()) < 45
    assert "55-59" in text
    assert "60 layers in 12 groups; --all shows every one" in text
    whole = drawn(summary, every=True)
    assert "55-59" not in whole
    assert "--all" not in whole
    assert sum(line.startswith("59 ") for line in whole.splitlines()) == 2  # in the table and in the map
