"""Files that torch.save wrote: what would be read as garbage, or without end, is refused in one line."""

import re
import time
import zipfile
from pathlib import Path

import pytest
import torch

from fisherkit.checkpoint.index import open_index
from fisherkit.errors import CheckpointError
from fisherkit.methods.inspect.summary import inspect


def repacked(path: Path, compression: int, only: str = "") -> Path:
    """The same archive, its records (or those of a name) compressed."""
    target = path.with_name("packed.pt")
    with zipfile.ZipFile(path) as found, zipfile.ZipFile(target, "w") as made:
        for record in found.infolist():
            kind = compression if only in record.filename else zipfile.ZIP_STORED
            made.writestr(record.filename.replace(path.stem, "packed", 1), found.read(record), kind)
    return target


@pytest.mark.parametrize("only", ["", "data/0", "data.pkl"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(compression: int, only: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100, 100)}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="compressed"):
        inspect(repacked(tmp_path / "plain.pt", compression, only))


def test_records_that_are_stored_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100, 100)}, tmp_path / "plain.pt")
    assert inspect(repacked(tmp_path / "plain.pt", zipfile.ZIP_STORED)).rows[0].sum == 10_000


@pytest.mark.parametrize("shape", [(10**12,), (10**6, 10**6), (2,)])
def test_one_element_that_poses_as_many_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(shape)}, tmp_path / "f.pt")
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="'w' repeats what is stored"):
        inspect(tmp_path / "f.pt")
    assert time.monotonic() - started < 5


def test_many_tensors_on_one_storage_are_bounded(tmp_path: Path) -> None:
    shared = torch.ones(1_000_000)
    torch.save({f"w{number}": shared for number in range(3)}, tmp_path / "tied.pt")
    assert len(open_index(tmp_path / "tied.pt").tensors) == 3
    torch.save({f"w{number}": shared for number in range(100)}, tmp_path / "many.pt")
    with pytest.raises(CheckpointError, match="repeats what is stored"):
        open_index(tmp_path / "many.pt")


def test_views_that_leave_something_out_are_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"columns": whole[:, 1:3], "turned": whole.T}, tmp_path / "f.pt")
    sums = {row.name: row.sum for row in inspect(tmp_path / "f.pt", by="tensor").rows}
    assert sums == {"columns": float(whole[:, 1:3].sum()), "turned": 66.0}


@pytest.mark.parametrize("shape", ["[4611686018427387904,0]", "[9223372036854775807,9223372036854775807]", "[3,-1]"])
def test_shapes_that_nothing_can_hold_are_refused(shape: str, tmp_path: Path) -> None:
    head = f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    (tmp_path / "f.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(CheckpointError, match="'w'") as caught:
        inspect(tmp_path / "f.safetensors")
    assert re.fullmatch(r".{1,300}", str(caught.value).replace(str(tmp_path), ""))
