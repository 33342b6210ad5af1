"""Drawings of a mask show where inside of its tensors it allows change: by head, by bands of rows, or of columns."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_files import change_json
from safetensors.numpy import save_file

from fisherkit.artefacts.mask_file import entry, header, pack
from fisherkit.errors import CheckpointError
from fisherkit.methods.inspect.mask_bands import MOST_BANDS, Bands, mask_bands
from fisherkit.methods.inspect.summary import inspect
from fisherkit.render import pages, summary_text, svg_bands, svg_summary
from fisherkit.render.files import write_figure

NS = "{http://www.w3.org/2000/svg}"
HEAD = 4
FISHER = {"model": {"id": "m", "head_dim": HEAD}}


def write(
    path: Path,
    flags: dict[str, np.ndarray],
    shapes: dict[str, tuple[int, ...]],
    over: int | None,
    fisher: dict[str, Any] | None = None,
) -> Path:
    """A mask over one axis, or of packed entries."""
    entries = {name: entry(one, shapes[name], over=over, packed=over is None) for name, one in flags.items()}
    save_file({name: pack(one) if over is None else one for name, one in flags.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(header("mask", path.name, entries, fisher=fisher)))
    return path


def rows_mask(path: Path, shape: tuple[int, ...] = (64, 10), fisher: dict[str, Any] | None = None) -> tuple[Path, dict]:
    """Half of the rows of q and o in three layers."""
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.self_attn.{module}.weight" for i in range(3) for module in ("q_proj", "o_proj")]
    flags = {name: rng.permutation(shape[0]) < shape[0] // 2 for name in names}
    return write(path, flags, dict.fromkeys(names, shape), 1, fisher), flags


def bands_of(path: Path) -> dict[str, Bands]:
    return {one.module: one for one in mask_bands(inspect(path))}


@pytest.mark.parametrize("rows", [1, 5, 32, 33, 64, 100])
def test_bands_are_means_over_nearly_equal_runs_of_rows(tmp_path: Path, rows: int) -> None:
    path, flags = rows_mask(tmp_path / "mask.safetensors", (rows, 10))
    found = bands_of(path)["self_attn.o_proj"]
    assert found.axis == "rows"
    dense = flags["model.layers.1.self_attn.o_proj.weight"].astype(float)
    pieces = np.array_split(dense, min(rows, MOST_BANDS))
    assert found.densities[1] == pytest.approx([piece.mean() for piece in pieces])


def test_heads_are_bands_where_their_size_is_known(tmp_path: Path) -> None:
    path, flags = rows_mask(tmp_path / "mask.safetensors", fisher=FISHER)
    found = bands_of(path)
    assert (found["self_attn.q_proj"].axis, found["self_attn.o_proj"].axis) == ("heads", "rows")
    heads = flags["model.layers.2.self_attn.q_proj.weight"].reshape(-1, HEAD).mean(axis=1)
    assert found["self_attn.q_proj"].densities[2] == pytest.approx(heads.tolist())


@pytest.mark.parametrize("head", [None, 0, -4, 7, "4", 1.5])
def test_a_size_of_heads_that_makes_no_sense_is_left_alone(tmp_path: Path, head: object) -> None:
    path, _ = rows_mask(tmp_path / "mask.safetensors", fisher={"model": {"head_dim": head}})
    assert bands_of(path)["self_attn.q_proj"].axis == "rows"


def test_masks_of_columns_have_bands_of_columns_and_heads_of_outputs_inputs(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{module}.weight" for module in ("q_proj", "o_proj")]
    flags = {name: np.arange(16) % 3 == 0 for name in names}
    found = bands_of(write(tmp_path / "m.safetensors", flags, dict.fromkeys(names, (8, 16)), 0, FISHER))
    assert (found["self_attn.q_proj"].axis, found["self_attn.o_proj"].axis) == ("columns", "heads")
    assert found["self_attn.o_proj"].densities[0] == pytest.approx([0.5, 0.25, 0.25, 0.5])


def test_packed_entries_count_by_row(tmp_path: Path) -> None:
    name, shape = "model.layers.0.mlp.up_proj.weight", (40, 9)
    flags = np.random.default_rng(0).random(shape) < 0.3
    found = bands_of(write(tmp_path / "m.safetensors", {name: flags}, {name: shape}, None))["mlp.up_proj"]
    pieces = np.array_split(flags.mean(axis=1), MOST_BANDS)
    assert found.densities[0] == pytest.approx([piece.mean() for piece in pieces])


def test_rows_of_fused_experts_follow_each_other(tmp_path: Path) -> None:
    name, shape = "model.layers.0.mlp.experts.gate_up_proj", (8, 4, 5)
    flags = np.random.default_rng(0).random((8, 4)) < 0.5
    found = bands_of(write(tmp_path / "m.safetensors", {name: flags}, {name: shape}, 2))["mlp.experts.gate_up_proj"]
    assert found.densities[0] == pytest.approx(flags.reshape(-1).astype(float).tolist())


def test_vectors_what_lies_outside_of_blocks_and_unknown_shapes_have_none(tmp_path: Path) -> None:
    shapes = {"model.layers.0.norm.weight": (7,), "lm_head.weight": (4, 4)}
    flags = {name: np.ones(shape, bool) for name, shape in shapes.items()}
    path = write(tmp_path / "m.safetensors", flags, shapes, None)
    assert mask_bands(inspect(path)) == ()
    path, _ = rows_mask(tmp_path / "plain.safetensors")
    path.with_suffix(".json").unlink()
    assert mask_bands(inspect(path)) == ()
    write_figure(inspect(path), tmp_path / "plain.svg")  # the map of densities remains


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    path, flags = rows_mask(tmp_path / "mask.safetensors")
    summary = inspect(path)
    change_json(path, lambda made: made["tensors"][next(iter(flags))].update(kept=10))
    with pytest.raises(CheckpointError, match="damaged"):
        mask_bands(summary)


# Drawings


def tips(text: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(text).iter(f"{NS}title")]  # noqa: S314  our own text


def test_equal_quotas_are_a_sentence_and_the_insides_a_drawing(tmp_path: Path) -> None:
    path, flags = rows_mask(tmp_path / "mask.safetensors", fisher=FISHER)
    summary = inspect(path)
    bands = mask_bands(summary)
    text = svg_summary.picture(summary, bands)
    assert "Every tensor of the blocks lets 50.0 % of its weights change" in text
    assert not any("density" in tip for tip in tips(text))
    heads = flags["model.layers.0.self_attn.q_proj.weight"].reshape(-1, HEAD).mean(axis=1)
    least, most = int(heads.argmin()), int(heads.argmax())
    assert (
        f"layer 0, self_attn.q_proj: {100 * heads[least]:.2f} % in head {least}, "
        f"{100 * heads[most]:.1f} % in head {most}" in tips(text)
    )
    assert "16 heads, first to last" in text
    assert pages.page(summary, bands).count("<svg ") == 1


def test_other_quotas_have_the_map_too(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    flags = {name: np.arange(16) < 4 * (at + 1) for at, name in enumerate(names)}
    summary = inspect(write(tmp_path / "m.safetensors", flags, dict.fromkeys(names, (16, 4)), 1))
    assert summary_text.quota_sentence(summary) is None
    text = svg_summary.picture(summary, mask_bands(summary))
    assert "layer 1, mlp.up_proj: density 50.0 %" in tips(text)
    assert "layer 2, mlp.up_proj: 0.00 % in band 12, 100.0 % in band 0" in tips(text)


def test_layers_without_the_tensor_and_narrower_ones_stay_empty() -> None:
    one = Bands("a", "rows", {0: (0.5, 1.0, 0.0), 2: (0.25,)})
    levels = svg_bands.levels(one, [0, 1, 2], 1.0)
    np.testing.assert_array_equal(levels, [[0.5, 1, 0], [np.nan] * 3, [0.25, np.nan, np.nan]])
    assert "layer 1, a: no such tensor" in svg_bands.bands([one, Bands("b", "rows", {1: (1.0,)})]).body


@pytest.mark.parametrize("name", ["m.html", "m.svg", "m.png"])
def test_every_kind_of_file_draws_the_insides(tmp_path: Path, name: str) -> None:
    if name.endswith("png"):
        pytest.importorskip("matplotlib")
    path, _ = rows_mask(tmp_path / "mask.safetensors", fisher=FISHER)
    write_figure(inspect(path), tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000
