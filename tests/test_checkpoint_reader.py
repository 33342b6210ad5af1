"""What is read is what is on disk, bit for bit, however it is asked for; and only what is asked for is read."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fisherkit.checkpoint import torch_reader
from fisherkit.checkpoint.dtypes import DTYPES, dtype_code, torch_dtype
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.errors import CheckpointError

NAN = float("nan")


def sample_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=generator),
        "bf16": torch.tensor([[1.0, NAN], [float("inf"), -0.0], [1e-40, 3e38]]).bfloat16(),
        "half": torch.randn(2, 3, 4, generator=generator).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "thin": torch.empty(3, 0),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(6).reshape(3, 2),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "f8": torch.randn(7, generator=generator).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, generator=generator, dtype=torch.complex64),
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.fixture(params=["safetensors", "pt", "sharded"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reader]:
    tensors = sample_tensors()
    if request.param == "pt":
        torch.save(tensors, tmp_path / "m.pt")
    elif request.param == "safetensors":
        safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    else:
        for name, tensor in tensors.items():
            safetensors.torch.save_file({name: tensor}, tmp_path / f"{name}.safetensors")
        places = ", ".join(f'"{name}": "{name}.safetensors"' for name in tensors)
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{places}}}}}')
    with Reader(open_index(tmp_path)) as opened:
        yield opened


def test_every_tensor_is_read_bit_for_bit(reader: Reader) -> None:
    for name, tensor in sample_tensors().items():
        assert same_bits(reader.read(name), tensor), name


def test_iterating_reads_everything_once_in_file_order(reader: Reader, tmp_path: Path) -> None:
    found = dict(reader)
    assert list(found) == list(open_index(tmp_path).tensors)
    assert all(same_bits(found[name], tensor) for name, tensor in sample_tensors().items())


def test_rows_equal_the_slice_of_the_whole(reader: Reader) -> None:
    for name in ("matrix", "bf16", "half", "ids", "flags", "f8", "empty", "thin"):
        whole = sample_tensors()[name]
        rows = whole.shape[0]
        for start, stop in {(0, rows), (0, 0), (rows, rows), (0, min(1, rows)), (rows // 2, rows)}:
            assert same_bits(reader.read_rows(name, start, stop), whole[start:stop]), (name, start, stop)


@pytest.mark.parametrize(("name", "start", "stop"), [("ids", 0, 4), ("ids", -1, 2), ("ids", 2, 1), ("scalar", 0, 1)])
def test_rows_that_are_not_there_are_refused(reader: Reader, name: str, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=f"rows {start} to {stop} of '{name}'"):
        reader.read_rows(name, start, stop)


def test_an_unknown_name_is_refused(reader: Reader) -> None:
    with pytest.raises(CheckpointError, match="has no tensor 'nothing'"):
        reader.read("nothing")


def test_threads_may_read_at_once(reader: Reader) -> None:
    tensors = sample_tensors()
    names = list(tensors) * 20
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(reader.read, names), strict=True):
            assert same_bits(found, tensors[name])


def test_a_tensor_outlives_the_reader_and_is_ours_to_change(reader: Reader, tmp_path: Path) -> None:
    found = reader.read("matrix")
    reader.close()
    found.zero_()
    reader.close()
    with Reader(open_index(tmp_path)) as again:
        assert same_bits(again.read("matrix"), sample_tensors()["matrix"])
    with pytest.raises(ValueError, match="already closed"):
        reader.read("matrix")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    safetensors.torch.save_file({"w": tensor}, tmp_path / "m.safetensors")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:100]], at))
    with Reader(open_index(tmp_path)) as reader:
        assert same_bits(reader.read("w"), tensor)


def test_a_file_cut_after_it_was_indexed_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1000)}, path)
    index = open_index(path)
    os.truncate(path, path.stat().st_size - 10)
    with (
        Reader(index) as reader,
        pytest.raises(CheckpointError, match=r"m\.safetensors: ends 10 bytes before tensor 'w'"),
    ):
        reader.read("w")


def test_a_file_removed_after_it_was_indexed_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.ones(10)}, path)
    index = open_index(path)
    path.unlink()
    with Reader(index) as reader, pytest.raises(CheckpointError, match=r"m\.safetensors: cannot be read"):
        reader.read("w")


def test_a_type_that_torch_lacks_is_refused_when_read(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with Reader(open_index(tmp_path)) as reader, pytest.raises(CheckpointError, match="'w' has type F4"):
        reader.read("w")


def test_the_table_of_types_agrees_with_torch() -> None:
    for code, known in DTYPES.items():
        dtype = torch_dtype(code)
        if dtype is not None:
            assert 8 * dtype.itemsize == known.bits
            assert dtype_code(dtype) == code
    assert torch_dtype("F4") is None
    assert torch_dtype("nonsense") is None
    assert dtype_code(torch.complex128) is None


def test_reading_a_large_file_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """240 MB in 24 tensors; what the process holds may grow by a few of them, not by all."""
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({f"t{i:02d}": torch.full((2_500_000,), float(i)) for i in range(24)}, path)
    code = f"""
import resource
from pathlib import Path
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint import torch_reader
from fisherkit.checkpoint.torch_reader import Reader
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Reader(open_index(Path({str(path)!r}))) as reader:
    reader.read_rows("t00", 0, 10)
    before = peak()
    for i, (name, tensor) in enumerate(reader):
        assert float(tensor[0]) == float(tensor[-1]) == i
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    assert int(done.stdout) * unit < 60e6


def test_many_at_once_are_read_bit_for_bit(reader: Reader) -> None:
    tensors = sample_tensors()
    found = reader.read_many([name for name in tensors if name != "flags"])
    assert found.keys() == tensors.keys() - {"flags"}
    assert all(same_bits(tensor, tensors[name]) for name, tensor in found.items())
    assert reader.read_many([]) == {}
    with pytest.raises(CheckpointError, match="has no tensor 'nobody'"):
        reader.read_many(["matrix", "nobody"])


@pytest.mark.parametrize("threads", [1, 3])
def test_many_are_read_alike_by_any_number_of_threads_and_in_any_parts(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_reader, "file_threads", lambda: threads)
    monkeypatch.setattr(torch_reader, "_PART_BYTES", 1000)
    tensors = {f"w{n}": torch.randn(n, 251) for n in (0, 1, 7, 30)}
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(tensors, path)
    with Reader(open_index(path)) as reader:
        found = reader.read_many(list(tensors))
        assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
        os.truncate(path, path.stat().st_size - 2510)
        with pytest.raises(CheckpointError, match=r"m\.safetensors: ends 2510 bytes before tensor 'w7'"):
            reader.read_many(list(tensors))
