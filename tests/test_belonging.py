"""A description is believed for the very file that it was written for, and for no other of the same layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fisher_files import fisher_tensors, write_fisher
from safetensors.torch import load_file, save_file

import fisherkit
from fisherkit.artefacts.covariance_file import CovarianceFile, description
from fisherkit.artefacts.mask_file import open_mask
from fisherkit.artefacts.sparse_delta import SparseDelta
from fisherkit.artefacts.sparse_writer import Entries, SparseWriter
from fisherkit.checkpoint.atomic import publish
from fisherkit.checkpoint.content import content_sha256
from fisherkit.checkpoint.index import open_index
from fisherkit.errors import CheckpointError
from fisherkit.methods.inspect.summary import inspect
from fisherkit.options import MaskOptions

KINDS_OF_FILE = ["fisher.pt", "fisher.safetensors", "fisher"]


@pytest.mark.parametrize("name", KINDS_OF_FILE)
def test_statistics_of_another_fisher_of_the_same_model_are_not_believed(name: str, tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        write_fisher(tmp_path / folder / name, fisher_tensors(seed=seed))
    own = inspect(tmp_path / "b" / name)
    assert own.notes == ()
    target = tmp_path / "a" / name
    if target.is_dir():
        for shard in (tmp_path / "b" / name).glob("*.safetensors"):
            shutil.copy(shard, target)
    else:
        shutil.copy(tmp_path / "b" / name, target)
    found = inspect(target)
    assert "does not belong to this file (other values)" in found.notes[0]
    assert [row.sum for row in found.rows] == pytest.approx([row.sum for row in own.rows])
    assert found.provenance is None


@pytest.mark.parametrize("name", KINDS_OF_FILE)
def test_old_statistics_without_a_hash_are_believed_with_a_remark(name: str, tmp_path: Path) -> None:
    path = write_fisher(tmp_path / name)
    beside = path / "fisher.json" if path.is_dir() else path.with_suffix(".json")
    made = json.loads(beside.read_text())
    del made["content_sha256"]
    beside.write_text(json.dumps(made))
    found = inspect(path)
    assert found.provenance is not None
    assert len(found.notes) == 1
    assert "notes no hash" in found.notes[0]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_hash_is_of_the_content_whatever_the_files_name(suffix: str, tmp_path: Path) -> None:
    tensors = fisher_tensors()
    paths = [write_fisher(tmp_path / f"{name}{suffix}", tensors, statistics=False) for name in ("one", "another")]
    assert content_sha256(paths[0]) == content_sha256(paths[1])
    other = {name: value.clone() for name, value in tensors.items()}
    next(iter(other.values()))[0, 0] += 1
    assert content_sha256(write_fisher(tmp_path / f"x{suffix}", other, statistics=False)) != content_sha256(paths[0])
    renamed = {name.replace("q_proj", "x_proj"): value for name, value in tensors.items()}
    assert content_sha256(write_fisher(tmp_path / f"y{suffix}", renamed, statistics=False)) != content_sha256(paths[0])


def test_the_hash_of_a_pickle_needs_no_torch_and_takes_the_old_format_too(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = write_fisher(tmp_path / "fisher.pt")
    code = (
        "import sys; from pathlib import Path; from fisherkit.checkpoint.content import content_sha256; "
        f"print(content_sha256(Path({str(path)!r})), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [content_sha256(path), "False"]
    old = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for number, file in enumerate(old):
        torch.save({"w": torch.full((5000,), float(number))}, file, _use_new_zipfile_serialization=False)
    assert content_sha256(old[0]) != content_sha256(old[1])


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"PK\x03\x04" + bytes(400), b""])
def test_a_damaged_pickle_has_no_hash_or_one_of_its_own(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "fisher.pt"
    path.write_bytes(content)
    if content:
        with pytest.raises(CheckpointError, match=r"fisher\.pt: damaged"):
            content_sha256(path)
    else:
        assert len(content_sha256(path)) == 64


@pytest.mark.parametrize("options", [{"keep": 0.3, "train": "top"}, {"svd_rank": 2}])
def test_a_mask_is_refused_with_the_description_of_another(options: dict[str, Any], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        fisher = write_fisher(tmp_path / f"{name}.fisher.safetensors", fisher_tensors(seed=seed))
        (tmp_path / name).mkdir()
        fisherkit.mask(fisher, tmp_path / name / "mask.safetensors", MaskOptions(**options))
    open_mask(tmp_path / "a" / "mask.safetensors").close()
    shutil.copy(tmp_path / "b" / "mask.safetensors", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"mask\.json: describes another file"):
        open_mask(tmp_path / "a" / "mask.safetensors")
    with pytest.raises(CheckpointError, match=r"mask\.json: describes another file"):
        inspect(tmp_path / "a" / "mask.safetensors")


def test_a_mask_of_a_fisher_with_a_foreign_sidecar_says_so(tmp_path: Path) -> None:
    path = write_fisher(tmp_path / "fisher.safetensors")
    said: list[str] = []
    fisherkit.mask(path, tmp_path / "a.safetensors", MaskOptions(preset="fggm"), say=said.append)
    assert not any("does not belong" in line for line in said)
    write_fisher(path, fisher_tensors(seed=5), statistics=False)
    fisherkit.mask(path, tmp_path / "b.safetensors", MaskOptions(preset="fggm"), say=said.append)
    assert any("fisher.json does not belong to fisher.safetensors (other values)" in line for line in said)
    assert json.loads((tmp_path / "b.json").read_text())["fisher"] == {"file": "fisher.safetensors"}


# Covariances


def covariances(path: Path, values: torch.Tensor, **row: Any) -> Path:
    """A file of one covariance, and the JSON beside it."""
    held = values if "sketch_rank" in row else values[*torch.triu_indices(*values.shape)]
    save_file({"w.input": held}, path, {"format": "pt"})
    known = {"side": "input", "tensors": ["w"], "layer": 0, "size": len(values), "sketch_rank": None, "trace": 1.0}
    path.with_suffix(".json").write_text(json.dumps(description(path, {}, {"w.input": known | row}, [])))
    return path


def test_covariances_are_what_their_json_says(tmp_path: Path) -> None:
    path = tmp_path / "f.activations.safetensors"
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    whole = rows.T @ rows
    with CovarianceFile(covariances(path, whole)) as file:
        assert np.array_equal(file.read("w.input").values, whole.numpy())
    with pytest.raises(CheckpointError, match="other tensors"):
        CovarianceFile(covariances(path, whole, sketch_rank=4))
    with pytest.raises(CheckpointError, match="other tensors"):
        CovarianceFile(covariances(path, whole, size=9))
    with (
        CovarianceFile(covariances(path, whole, sketch_rank=8)) as file,
        pytest.raises(CheckpointError, match="factor"),
    ):
        file.read("w.input")
    values, vectors = torch.linalg.eigh(whole)
    factor = (vectors * values.sqrt())[:, 4:].contiguous()
    with CovarianceFile(covariances(path, factor, sketch_rank=4)) as file:
        assert file.read("w.input").is_factor
    whole[0, 0] = torch.nan
    with CovarianceFile(covariances(path, whole)) as file, pytest.raises(CheckpointError, match=r"w\.input"):
        file.read("w.input")
    covariances(path, rows.T @ rows)
    save_file({"w.input": torch.ones(36)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="describes another file"):
        CovarianceFile(path)


def test_covariances_of_the_first_format_are_whole(tmp_path: Path) -> None:
    path, rows = tmp_path / "f.activations.safetensors", torch.randn(50, 8)
    whole = rows.T @ rows
    covariances(path, whole, sketch_rank=8)
    made = json.loads(path.with_suffix(".json").read_text())
    made["moments"]["w.input"]["sketch_rank"] = None
    made["format"] = "fisherkit.activations/1"
    path.with_suffix(".json").write_text(json.dumps(made))
    with CovarianceFile(path) as file:
        assert np.array_equal(file.read("w.input").values, whole.numpy())


# Sparse deltas


def delta(tmp_path: Path) -> tuple[Path, Path]:
    """A base of 70,000 entries and a sparse delta of three of them."""
    base = tmp_path / "base.safetensors"
    save_file({"w": torch.zeros(70, 1000), "b": torch.zeros(3)}, base, {"format": "pt"})
    work = tmp_path / "work"
    work.mkdir()
    writer = SparseWriter(work)
    places = np.array([5, 65_536, 69_999])
    writer.add("w", Entries("F32", 70_000, places, np.array([1, 2, 3], np.float32)))
    target = tmp_path / "d.safetensors"
    writer.stage(work, target, {"base_fingerprint": open_index(base).fingerprint()})
    publish([(work / path.name, path) for path in (target.with_suffix(".json"), target)])
    writer.close()
    return base, tmp_path / "d.safetensors"


def test_a_sparse_delta_puts_its_entries_where_they_were(tmp_path: Path) -> None:
    base, path = delta(tmp_path)
    out = np.zeros(70_000, np.float32)
    with SparseDelta(path, open_index(base)) as found:
        found.apply("w", out)
    assert np.flatnonzero(out).tolist() == [5, 65_536, 69_999]


@pytest.mark.parametrize(
    "change",
    [
        {"w.place": torch.tensor([-5, 0, 4463], dtype=torch.int16)},
        {"w.place": torch.tensor([5, 0, 4464], dtype=torch.uint16)},
        {"w.count": torch.tensor([2, 1], dtype=torch.uint32), "w.place": torch.tensor([5, 5, 0], dtype=torch.uint16)},
        {"w.count": torch.tensor([2, 1], dtype=torch.uint32), "w.place": torch.tensor([6, 5, 0], dtype=torch.uint16)},
        {"w.count": torch.tensor([1, 1], dtype=torch.uint32)},
        {"w.count": torch.tensor([1, 2, 0], dtype=torch.uint32)},
        {"w.count": torch.tensor([1, 2], dtype=torch.int32)},
        {"w.value": torch.ones(3, dtype=torch.bfloat16)},
        {"w.value": torch.ones(2)},
        {"w.value": torch.ones(3, 1)},
    ],
)
def test_entries_that_are_no_places_of_the_tensor_are_refused(change: dict[str, torch.Tensor], tmp_path: Path) -> None:
    base, path = delta(tmp_path)
    save_file({**load_file(path), **change}, path, {"format": "pt"})
    beside = path.with_suffix(".json")
    made = json.loads(beside.read_text()) | {"content_sha256": content_sha256(path)}
    beside.write_text(json.dumps(made))
    out = np.zeros(70_000, np.float32)
    with pytest.raises(CheckpointError, match=r"d\.safetensors: the entries of 'w'"):  # noqa: SIM117
        with SparseDelta(path, open_index(base)) as found:
            found.apply("w", out)
    assert not out.any()


def test_a_sparse_delta_is_refused_with_the_description_of_another(tmp_path: Path) -> None:
    base, path = delta(tmp_path)
    save_file({**load_file(path), "w.value": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"d\.json: describes another file"):
        SparseDelta(path, open_index(base))
