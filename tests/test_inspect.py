import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fisher_files import fisher_tensors, write_fisher
from safetensors.torch import save_file

from fisherkit.artefacts.statistics import measure
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.kernels.ranks import mean_ranks, rank_correlation, top_overlap
from fisherkit.methods.inspect.heat_map import HeatMap
from fisherkit.methods.inspect.records import render
from fisherkit.methods.inspect.summary import inspect

KINDS_OF_FILE = ["fisher.pt", "fisher.safetensors", "fisher"]


@pytest.mark.parametrize("name", KINDS_OF_FILE)
@pytest.mark.parametrize("by", ["layer", "module", "tensor"])
def test_statistics_beside_the_file_equal_reading_the_tensors(tmp_path: Path, name: str, by: str) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    known = inspect(write_fisher(tmp_path / "with" / name), by=by)
    read = inspect(write_fisher(tmp_path / "without" / name, statistics=False), by=by)
    assert known.provenance is not None
    assert read.provenance is None
    key = lambda row: row.name  # noqa: E731  files order tensors differently
    assert sorted(known.rows, key=key) == sorted(read.rows, key=key)
    assert known.histogram.count == read.histogram.count
    assert dict(known.mass()) == pytest.approx(dict(read.mass()))
    assert known.notes == read.notes == ()


def test_rows_equal_sums_in_float64(tmp_path: Path) -> None:
    tensors = fisher_tensors()
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors", tensors))
    total = sum(tensor.double().sum().item() for tensor in tensors.values())
    assert [row.name for row in summary.rows] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    for layer, row in enumerate(summary.rows):
        mine = torch.cat([t.double().flatten() for name, t in tensors.items() if f"layers.{layer}." in name])
        assert row.sum == pytest.approx(mine.sum().item(), rel=1e-12)
        assert row.mean == pytest.approx(mine.mean().item(), rel=1e-12)
        assert row.share == pytest.approx(mine.sum().item() / total, rel=1e-12)
        assert (row.weights, row.max) == (mine.numel(), mine.max().item())
    assert sum(row.share for row in summary.rows) == pytest.approx(1.0)
    assert [row.tensors for row in summary.rows] == [4, 4, 3]


def test_layers_are_in_numeric_order_and_what_lies_outside_comes_last(tmp_path: Path) -> None:
    names = ["lm_head.weight", "model.layers.10.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"]
    tower = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    tensors = {name: torch.rand(2, 3) for name in [tower, *names]}
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors", tensors))
    listed = [row.name for row in summary.rows]
    assert listed[:2] == ["model.layers.9", "model.layers.10"]
    assert set(listed[2:]) == {"lm_head", "model.vision_tower.encoder.layers.0"}
    assert [row.layer for row in summary.rows] == [9, 10, None, None]
    assert summary.heat.layers == (9, 10)


def test_the_experts_of_a_layer_are_one_module(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": torch.full((2, 3), i + 1.0) for i in range(3)}
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors", tensors), by="module")
    assert [(row.name, row.tensors, row.mean) for row in summary.rows] == [("mlp.experts.up_proj", 3, 2.0)]


def test_inspect_with_statistics_imports_no_torch(tmp_path: Path) -> None:
    path = write_fisher(tmp_path / "fisher.safetensors")
    code = (
        "import sys; from fisherkit.methods.inspect.summary import inspect; "
        f"assert len(inspect({str(path)!r}).rows) == 3; "
        "print([name for name in ('torch', 'numpy', 'safetensors', 'rich', 'typer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", KINDS_OF_FILE)
def test_statistics_of_another_file_are_not_believed(tmp_path: Path, name: str) -> None:
    path = write_fisher(tmp_path / name)
    beside = path / "fisher.json" if path.is_dir() else path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"file_bytes": 1}))
    summary = inspect(path)
    assert len(summary.rows) == 3
    assert summary.provenance is None
    assert summary.notes[0].startswith("fisher.json does not belong to this file")


def test_statistics_of_other_tensors_of_the_same_size_are_not_believed(tmp_path: Path) -> None:
    path = write_fisher(tmp_path / "fisher.safetensors")
    beside = path.with_suffix(".json")
    beside.write_text(beside.read_text().replace("q_proj", "x_proj"))
    assert "other tensors" in inspect(path).notes[0]


@pytest.mark.parametrize(
    "damage",
    [
        {"tensors": 3},
        {"tensors": {"a": {}}},
        {"histogram": [[1, 0, 0]]},
        {"model": 7},
        {"format": "fisherkit.fisher/9"},
    ],
)
def test_damaged_statistics_are_not_believed(tmp_path: Path, damage: dict[str, object]) -> None:
    path = write_fisher(tmp_path / "fisher.pt")
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | damage))
    assert "does not belong" in inspect(path).notes[0]


def test_a_config_beside_a_file_is_not_taken_for_statistics(tmp_path: Path) -> None:
    path = write_fisher(tmp_path / "fisher.pt", statistics=False)
    path.with_suffix(".json").write_text("[1, 2]")
    assert inspect(path).notes == ()
    path.with_suffix(".json").write_text("[1, 2")  # who knows whose it was
    with pytest.raises(CheckpointError, match=r"fisher\.json: .* is not valid JSON"):
        inspect(path)


def test_the_statistics_alone_can_be_inspected(tmp_path: Path) -> None:
    path = write_fisher(tmp_path / "fisher.pt")
    whole = inspect(path)
    path.unlink()
    alone = inspect(tmp_path / "fisher.json")
    assert alone.rows == whole.rows
    assert alone.kind == "fisher"


def test_a_plain_checkpoint_is_measured_by_magnitude(tmp_path: Path) -> None:
    weights = {"model.layers.0.mlp.up_proj.weight": torch.tensor([[-3.0, 1.0], [0.0, 2.0]])}
    save_file(weights, tmp_path / "model.safetensors")
    summary = inspect(tmp_path / "model.safetensors")
    assert summary.kind == "checkpoint"
    assert (summary.rows[0].sum, summary.rows[0].mean, summary.rows[0].zeros) == (6.0, 1.5, 1)


def test_a_folder_with_a_config_is_a_checkpoint(tmp_path: Path) -> None:
    save_file({"model.layers.0.a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert inspect(tmp_path).kind == "checkpoint"


def test_a_mask_shows_its_density(tmp_path: Path) -> None:
    flags = {
        "model.layers.0.mlp.up_proj.weight": torch.tensor([True, False, False, False]),
        "model.layers.1.mlp.up_proj.weight": torch.tensor([True, True, True, False]),
    }
    save_file(flags, tmp_path / "mask.safetensors")
    summary = inspect(tmp_path / "mask.safetensors")
    assert summary.kind == "mask"
    assert [record["density"] for record in summary.records()] == [0.25, 0.75]
    assert summary.heat.level(0, "mlp.up_proj") == 0.25
    assert summary.mass() == ()


def test_packed_bits_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "mask.safetensors")
    with pytest.raises(CheckpointError, match="packed bits"):
        inspect(tmp_path / "mask.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        {"layers": [{"layer": 0, "name": "0", "sum": 1.0}, {"layer": 1, "name": "1", "sum": 3.0}], "total": 4.0},
        {"0": 1.0, "1": 3.0},
        {"1": 3, "0": 1},
        [1.0, 3.0],
    ],
)
def test_layer_importance_is_read_in_all_its_forms(tmp_path: Path, content: object) -> None:
    path = tmp_path / "layer_importance.json"
    path.write_text(json.dumps(content))
    assert inspect(path).records() == [
        {"layer": "0", "sum": 1.0, "share": 0.25},
        {"layer": "1", "sum": 3.0, "share": 0.75},
    ]


def test_layer_importance_has_no_modules(tmp_path: Path) -> None:
    (tmp_path / "layer_importance.json").write_text("[1, 2]")
    with pytest.raises(OptionError, match="holds layers only"):
        inspect(tmp_path / "layer_importance.json", by="module")


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"a": 1}', '"x"', "[null]x", '[{"layer": "x"}]', "3"])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        inspect(tmp_path / "x.json")


def test_a_missing_file_and_an_unknown_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(tmp_path / "nothing.pt")
    with pytest.raises(OptionError, match=r"--by.*layer, module, tensor"):
        inspect(tmp_path, by="row")  # type: ignore[arg-type]


def test_values_that_are_not_finite_are_counted_and_become_null(tmp_path: Path) -> None:
    tensors = fisher_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = math.nan
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors", tensors))
    assert [row.nonfinite for row in summary.rows] == [0, 3, 0]
    assert summary.broken == ("model.layers.1.mlp.up_proj.weight",)
    assert summary.dead == ("model.layers.0.mlp.up_proj.weight",)
    assert all(math.isfinite(row.sum) for row in summary.rows)


def test_a_fisher_of_zeros_has_no_shares(tmp_path: Path) -> None:
    zeros = {"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors", zeros))
    assert summary.records()[0]["share"] is None
    assert summary.rows[0].dead
    assert summary.mass() == ()
    assert summary.heat.bounds is None


# Sorting and text


def test_sort_puts_the_largest_first_and_a_dash_the_smallest(tmp_path: Path) -> None:
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors"), by="tensor")
    values = [row.sum for row in summary.sorted("sum").rows]
    assert values == sorted(values, reverse=True)
    assert [row.sum for row in summary.sorted("-sum").rows] == values[::-1]
    assert summary.sorted("sum", top=2).rows == summary.sorted("sum").rows[:2]
    assert summary.sorted(None, top=1000).rows == summary.rows


def test_sort_by_name_counts_layers(tmp_path: Path) -> None:
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors", fisher_tensors(layers=12)))
    assert [row.layer for row in summary.sorted("layer").rows] == list(range(11, -1, -1))


def test_sort_by_an_unknown_column_lists_the_columns(tmp_path: Path) -> None:
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors"))
    with pytest.raises(OptionError, match=r"column.*layer, tensors, weights, sum, mean, share"):
        summary.sorted("size")
    with pytest.raises(OptionError, match=r"--top.*at least 1"):
        summary.sorted(top=0)


def test_text_keeps_every_bit_of_a_number(tmp_path: Path) -> None:
    summary = inspect(write_fisher(tmp_path / "fisher.safetensors"))
    records = summary.records()
    assert json.loads(render(records, summary.columns, "json")) == records
    lines = render(records, summary.columns, "jsonl").splitlines()
    assert [json.loads(line) for line in lines] == records
    for form, separator in (("tsv", "\t"), ("csv", ",")):
        header, *rows = render(records, summary.columns, form).splitlines()
        assert tuple(header.split(separator)) == summary.columns
        assert [float(row.split(separator)[3]) for row in rows] == [record["sum"] for record in records]


def test_text_of_what_is_not_a_number_is_null_and_control_characters_are_spelled_out() -> None:
    records = [{"tensor": "a\tb\nc\x1b[31m", "sum": math.nan, "mean": math.inf, "share": None}]
    assert render(records, list(records[0]), "tsv").splitlines()[1] == "a\\tb\\nc\\x1b[31m\tnull\tnull\tnull"
    assert json.loads(render(records, list(records[0]), "json"))[0]["sum"] is None
    assert render([], ["layer"], "json") == "[]\n"
    assert render([], ["layer"], "tsv") == "layer\n"


def test_heat_map_levels_span_the_scale_and_equal_means_are_on_top() -> None:
    heat = HeatMap((0,), ("a", "b", "c", "d"), {(0, "a"): 1e-8, (0, "b"): 1e-6, (0, "c"): 1e-4, (0, "d"): 0.0})
    assert [heat.level(0, module) for module in "abcd"] == [0.0, pytest.approx(0.5), 1.0, None]
    assert heat.level(1, "a") is None
    assert HeatMap((0,), ("a",), {(0, "a"): 3.0}).level(0, "a") == 1.0


# Two files


def top_by_sorting(values: np.ndarray, k: int) -> set[int]:
    """Oracle: indices of the k largest, ties by index."""
    return set(np.argsort(-values, kind="stable")[:k].tolist())


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("levels", [3, 1000])
def test_overlap_equals_sorting_with_ties_by_index(fraction: float, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    a, b = (torch.randint(levels, (40, 70), generator=generator).float() for _ in range(2))
    k = max(1, round(fraction * a.numel()))
    common = top_by_sorting(a.numpy().ravel(), k) & top_by_sorting(b.numpy().ravel(), k)
    assert top_overlap(a, b, [fraction]) == [len(common) / k]


def test_overlap_does_not_depend_on_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(50, (1_100_000,), generator=generator).float() for _ in range(2))  # more than one block
    k = round(0.3 * a.numel())
    common = top_by_sorting(a.numpy(), k) & top_by_sorting(b.numpy(), k)
    assert top_overlap(a, b, [0.3]) == [len(common) / k]


def test_overlap_of_nothing_is_nan_and_of_itself_is_one() -> None:
    assert all(map(math.isnan, top_overlap(torch.zeros(0), torch.zeros(0), [0.1, 0.3])))
    assert top_overlap(torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 2.0]), [0.5]) == [1.0]
    assert top_overlap(torch.zeros(10), torch.zeros(10), [0.3]) == [1.0]


def ranks_by_counting(values: np.ndarray) -> np.ndarray:
    """Oracle: how many are smaller, plus half of the equal others."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def test_rank_correlation_equals_pearson_of_counted_ranks() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(20, (300,), generator=generator).float()
    b = a + torch.randint(9, (300,), generator=generator)
    np.testing.assert_array_equal(mean_ranks(a).numpy(), ranks_by_counting(a.numpy()))
    expected = np.corrcoef(ranks_by_counting(a.numpy()), ranks_by_counting(b.numpy()))[0, 1]
    assert rank_correlation(a, b) == pytest.approx(expected, rel=1e-12)
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, 1 / (1 + a)) == pytest.approx(-1.0)


def test_rank_correlation_of_a_constant_or_a_single_entry_is_nan() -> None:
    assert math.isnan(rank_correlation(torch.ones(9), torch.rand(9)))
    assert math.isnan(rank_correlation(torch.ones(1), torch.ones(1)))


def test_rank_correlation_of_a_sample_is_close_and_repeatable() -> None:
    a = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    b = a + torch.rand(50_000, generator=torch.Generator().manual_seed(1))
    sampled = rank_correlation(a, b, sample=10_000)
    assert sampled == rank_correlation(a, b, sample=10_000)
    assert sampled == pytest.approx(rank_correlation(a, b), abs=0.02)


def test_a_file_agrees_with_itself_and_not_with_another(tmp_path: Path) -> None:
    one = write_fisher(tmp_path / "one.safetensors")
    same = write_fisher(tmp_path / "same.pt")
    other = write_fisher(tmp_path / "other", fisher_tensors(seed=9))
    for record in inspect(one, same).records():
        assert (record["overlap_10"], record["overlap_30"]) == (1.0, 1.0)
        assert record["rank_correlation"] == pytest.approx(1.0)
    for record in inspect(one, other, by="module").records():
        assert abs(float(record["rank_correlation"] or 0)) < 0.3
        assert 0 < float(record["overlap_30"] or 0) < 0.6


def test_rows_average_their_tensors_by_size(tmp_path: Path) -> None:
    big, small = "model.layers.0.a.weight", "model.layers.0.b.weight"
    here = {big: torch.arange(30.0).view(5, 6), small: torch.arange(10.0).view(2, 5)}
    there = {big: here[big].clone(), small: here[small].flip(0, 1)}
    row = inspect(write_fisher(tmp_path / "a.safetensors", here), write_fisher(tmp_path / "b.safetensors", there)).rows[
        0
    ]
    assert row.agreement is not None
    assert row.agreement.rank_correlation == pytest.approx((30 * 1 + 10 * -1) / 40)
    assert row.agreement.overlap_30 == pytest.approx(30 / 40)


def test_only_common_tensors_are_compared(tmp_path: Path) -> None:
    tensors = fisher_tensors()
    here = write_fisher(tmp_path / "here.safetensors", tensors)
    there = write_fisher(tmp_path / "there.safetensors", {"x.weight": torch.ones(2)} | dict(list(tensors.items())[:5]))
    summary = inspect(here, there)
    assert summary.comparison is not None
    assert (len(summary.comparison.tensors), summary.comparison.only_here, summary.comparison.only_there) == (5, 6, 1)
    assert summary.records()[2]["rank_correlation"] is None


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    here = write_fisher(tmp_path / "here.safetensors")
    with pytest.raises(CheckpointError, match="no tensor in common"):
        inspect(here, write_fisher(tmp_path / "x.safetensors", {"x.weight": torch.ones(2)}))
    wrong = dict.fromkeys(fisher_tensors(), torch.ones(2))
    torch.save(wrong, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=r"_proj.weight.*\[6, 40\] in .*\[2\] in"):
        inspect(here, tmp_path / "wrong.pt")
    with pytest.raises(OptionError, match="name the tensors"):
        inspect(here, tmp_path / "here.json")
    save_file({"a": torch.ones(3, dtype=torch.bool)}, tmp_path / "mask.safetensors")
    with pytest.raises(OptionError, match="a mask has no ranks"):
        inspect(here, tmp_path / "mask.safetensors")


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = write_fisher(tmp_path / "fisher.safetensors", statistics=False)
    inspect(path, path, track=lambda *step: seen.append(step))
    stages = ("reading", "comparing", "reading")  # both files are summed up: their maps are drawn side by side
    assert seen == [(stage, done, 11) for stage in stages for done in range(1, 12)]


def test_large_tensors_are_read_in_rows(tmp_path: Path) -> None:
    tensors = fisher_tensors()
    path = write_fisher(tmp_path / "fisher.safetensors", tensors, statistics=False)
    total = inspect(path).total
    index = open_index(path)
    with Reader(index) as reader:
        parts = [measure(reader, info, rows_bytes=100) for info in index.tensors.values()]
    assert sum(part.sum for part in parts) == pytest.approx(total.sum, rel=1e-12)
    assert sum(part.numel for part in parts) == total.weights == sum(t.numel() for t in tensors.values())
