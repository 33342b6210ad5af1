"""Mask files: what was written is what is read, and nothing damaged or foreign passes."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_files import EXPERTS, LAYOUT, PACKED, ROWS, VECTOR, change_json, flags_of, write_mask, write_subspace
from safetensors.numpy import save_file

from fisherkit.artefacts import mask_file
from fisherkit.artefacts.mask_file import MaskEntry, entry, fit, open_mask, pack, unpack
from fisherkit.errors import CheckpointError


@pytest.mark.parametrize("name", LAYOUT)
def test_what_is_read_is_what_was_written_and_broadcasts_to_the_weight(name: str, tmp_path: Path) -> None:
    shape, over, _ = LAYOUT[name]
    full = np.broadcast_to(flags_of(name) if over is None else np.expand_dims(flags_of(name), over), shape)
    with open_mask(write_mask(tmp_path / "m.safetensors")) as mask:
        assert mask.shape(name) == shape
        assert (np.broadcast_to(mask.read(name), shape) == full).all()
        assert mask.read(name, shape).dtype == np.bool_
        found = mask.entry(name)
        assert found is not None
        assert mask.kept(name) == full.sum() == found.kept
        assert found.density == full.mean()


def test_a_mask_says_how_it_was_made(tmp_path: Path) -> None:
    with open_mask(write_mask(tmp_path / "m.safetensors")) as mask:
        assert (mask.kind, mask.direction, mask.options) == ("mask", "train", {"keep": 0.4})
        assert mask.fisher == {"model": {"id": "m"}}
        assert sorted(mask.names) == sorted(LAYOUT)
        assert "tensors" not in mask.made


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
def test_packing_puts_entry_8j_plus_i_in_bit_i_of_byte_j(count: int) -> None:
    flags = np.random.default_rng(count).random(count) < 0.5
    slow = [sum(int(flag) << bit for bit, flag in enumerate(flags[at : at + 8])) for at in range(0, count, 8)]
    assert pack(flags).tolist() == slow
    assert (unpack(pack(flags), (count,)) == flags).all()


def test_unpacking_needs_the_right_number_of_bytes() -> None:
    with pytest.raises(ValueError, match="2 bytes for 5 flags"):
        unpack(np.zeros(2, np.uint8), (5,))


@pytest.mark.parametrize(
    ("flags", "weight", "wanted"),
    [
        ((6, 5), (6, 5), (6, 5)),
        ((6,), (6, 5), (6, 1)),
        ((6, 1), (6, 5), (6, 1)),
        ((1, 5), (6, 5), (1, 5)),
        ((3, 4), (3, 4, 5), (3, 4, 1)),
        ((7,), (7,), (7,)),
        ((5,), (5, 5), (5, 1)),
    ],
)
def test_flags_without_a_description_are_fitted_by_shape(
    flags: tuple[int, ...], weight: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert fit(np.ones(flags, np.bool_), weight).shape == wanted


@pytest.mark.parametrize(("flags", "weight"), [((5,), (6, 5)), ((6, 5), (5, 6)), ((), (3,)), ((2, 3), (2, 3, 4, 5))])
def test_flags_that_fit_in_no_way_are_refused(flags: tuple[int, ...], weight: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        fit(np.ones(flags, np.bool_), weight)


def test_plain_flags_are_readable_without_a_description(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.safetensors", (ROWS, VECTOR, EXPERTS))
    path.with_suffix(".json").unlink()
    with open_mask(path) as mask:
        assert mask.shape(ROWS) is None
        assert mask.read(ROWS).shape == (6,)
        assert (mask.read(ROWS, (6, 5)) == flags_of(ROWS)[:, None]).all()
        assert mask.read(EXPERTS, (3, 4, 5)).shape == (3, 4, 1)
        assert mask.kept(VECTOR) == flags_of(VECTOR).sum()
        assert (mask.direction, mask.options, mask.fisher) == (None, {}, None)


def test_packed_flags_need_their_description(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.safetensors")
    path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=r"packed bits.*m.json"):
        open_mask(path)


def test_a_fisher_is_no_mask(tmp_path: Path) -> None:
    save_file({"w": np.ones((2, 2), np.float32)}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="not a mask: w is F32"):
        open_mask(tmp_path / "f.safetensors")


@pytest.mark.parametrize("sides", ["USV", "US", "SV", "U", "V"])
@pytest.mark.parametrize("described", [True, False])
def test_modes_have_orthonormal_columns_and_a_side_may_be_missing(sides: str, described: bool, tmp_path: Path) -> None:
    path = write_subspace(tmp_path / "s.safetensors", sides=sides)
    if not described:
        path.with_suffix(".json").unlink()
    with open_mask(path) as subspace:
        assert (subspace.kind, subspace.names) == ("subspace", ("w",))
        modes = subspace.modes("w", (6, 5))
        assert [side for side, part in zip("USV", modes, strict=True) if part is not None] == list(sides)
        for part in (modes.u, modes.v):
            assert part is None or np.allclose(part.T @ part, np.eye(2), atol=1e-6)


def test_experts_have_modes_of_their_own(tmp_path: Path) -> None:
    with open_mask(write_subspace(tmp_path / "s.safetensors", shape=(3, 6, 5))) as subspace:
        modes = subspace.modes("w", (3, 6, 5))
        assert modes.u is not None
        assert modes.u.shape == (3, 6, 2)


@pytest.mark.parametrize("shape", [(5, 6), (6, 6), (6,), (3, 6, 5)])
def test_modes_of_another_model_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write_subspace(tmp_path / "s.safetensors")
    for _ in ("described", "undescribed"):
        with open_mask(path) as subspace, pytest.raises(CheckpointError, match="made for another model"):
            subspace.modes("w", shape)
        path.with_suffix(".json").unlink(missing_ok=True)


def test_modes_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_file({"w.U": np.full((6, 2), np.nan, np.float32)}, path)
    with open_mask(path) as subspace, pytest.raises(CheckpointError, match=r"w\.U.*NaN"):
        subspace.modes("w")


def test_a_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    with open_mask(write_mask(tmp_path / "m.safetensors")) as mask:
        with pytest.raises(CheckpointError, match=r"rows.*\[6, 6\].*model.*\[6, 5\].*mask"):
            mask.read(ROWS, (6, 6))
        with pytest.raises(CheckpointError, match=r"nothing.*'absent'"):
            mask.read("absent")


def test_kinds_are_not_confused(tmp_path: Path) -> None:
    with (
        open_mask(write_mask(tmp_path / "m.safetensors")) as mask,
        pytest.raises(CheckpointError, match=r"a mask.*subspace"),
    ):
        mask.modes(ROWS)
    with (
        open_mask(write_subspace(tmp_path / "s.safetensors")) as subspace,
        pytest.raises(CheckpointError, match=r"a subspace.*mask"),
    ):
        subspace.read("w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.update(file="other.safetensors"), "belongs to 'other.safetensors'"),
        (lambda made: made.update(format="fisherkit.fisher/1"), "does not describe a mask"),
        (lambda made: made.update(kind="adapter"), "does not describe a mask"),
        (lambda made: made.update(tensors=[]), "does not describe a mask"),
        (lambda made: made["tensors"].pop(ROWS), "other tensors than m.json.*'rows'"),
        (lambda made: made["tensors"].update(new=made["tensors"][ROWS]), "other tensors than m.json"),
        (lambda made: made["tensors"][ROWS].update(over=0), r"rows.*BOOL \[6\].*JSON.*BOOL \[5\]"),
        (lambda made: made["tensors"][ROWS].update(over=2), "rows"),
        (lambda made: made["tensors"][ROWS].update(over="1"), "rows"),
        (lambda made: made["tensors"][ROWS].update(kept=31), "rows"),
        (lambda made: made["tensors"][ROWS].update(shape=[6, -5]), "rows"),
        (lambda made: made["tensors"][PACKED].update(packed=False), "packed is U8"),
        (lambda made: made["tensors"][PACKED].update(shape=[6, 6]), r"JSON.*U8 \[5\]"),
        (lambda made: made["tensors"].update({ROWS: None}), "rows"),
    ],
)
def test_a_description_that_is_not_of_this_file_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    path = write_mask(tmp_path / "m.safetensors")
    change_json(path, change)
    with pytest.raises(CheckpointError, match=message):
        open_mask(path)


def test_flags_that_changed_since_they_were_counted_are_noticed(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.safetensors")
    change_json(path, lambda made: made["tensors"][PACKED].update(kept=1))
    with open_mask(path) as mask, pytest.raises(CheckpointError, match="packed is damaged"):
        mask.read(PACKED)


def test_a_mask_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        open_mask(path)


def test_a_description_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.safetensors")
    path.with_suffix(".json").write_text("{")
    with pytest.raises(CheckpointError, match=r"mask.*JSON"):
        open_mask(path)


def test_an_entry_of_other_flags_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"\[5\].*\[6, 5\].*axis 1"):
        entry(np.ones(5, np.bool_), (6, 5), over=1)
    with pytest.raises(ValueError, match="packed: True"):
        MaskEntry((6, 5), 1, packed=True)


def test_counts_are_of_weights_not_of_flags() -> None:
    found = entry(np.array([True, False, True]), (3, 4), over=1)
    assert (found.kept, found.density, found.numel) == (8, 8 / 12, 12)
    assert MaskEntry((0, 4), 1).density == 0.0
    assert math.prod(found.spec("w").shape) == 3


def test_reading_masks_imports_no_torch() -> None:
    code = "import sys, fisherkit.artefacts.mask_file; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_there() -> None:
    assert all(hasattr(mask_file, name) for name in mask_file.__all__)
