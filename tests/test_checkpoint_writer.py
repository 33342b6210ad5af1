"""Streamed files: what is written is what is read back, in any order, in the memory of one tensor."""

import json
import os
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from stored import TARGETS, contents, create, same_bits, sample_tensors, work_of, write_all

from fisherkit.checkpoint.descriptors import OpenFiles
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.layout import lay_out, write_checksums
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec

NAN = float("nan")


# What is written


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_written_in_any_order_is_read_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    tensors = sample_tensors()
    with create(tmp_path / name, tensors, shard_bytes=100) as writer:
        for key in reversed(tensors):
            writer.write(key, tensors[key])
        assert not (tmp_path / name).exists()
        files = writer.finish()
    assert all(file.is_file() for file in files)
    with Reader(open_index(tmp_path / name)) as reader:
        found = dict(reader)
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[key], tensor) for key, tensor in tensors.items())
    assert list(work_of(tmp_path / name).iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"weights_only": True}, {"weights_only": True, "mmap": True}])
def test_a_pt_is_what_torch_save_makes(tmp_path: Path, options: dict[str, bool]) -> None:
    tensors = sample_tensors()
    write_all(tmp_path / "fisher.pt", tensors)
    found = torch.load(tmp_path / "fisher.pt", **options)
    assert type(found) is dict
    assert list(found) == list(tensors)
    assert all(same_bits(found[key], tensor) for key, tensor in tensors.items())
    assert not any(tensor.requires_grad for tensor in found.values())


def test_the_records_inside_a_pt_are_those_that_torch_save_writes(tmp_path: Path) -> None:
    tensors = sample_tensors()
    write_all(tmp_path / "fisher.pt", tensors)
    (tmp_path / "whole").mkdir()
    torch.save(tensors, tmp_path / "whole" / "fisher.pt")
    with zipfile.ZipFile(tmp_path / "fisher.pt") as ours, zipfile.ZipFile(tmp_path / "whole" / "fisher.pt") as theirs:
        assert ours.namelist() == theirs.namelist()
        for name in ours.namelist():
            if not name.endswith(("data.pkl", "serialization_id")):  # back references; a hash of other checksums
                assert ours.read(name) == theirs.read(name), name


def test_the_checksums_of_a_pt_are_right_for_those_who_look(tmp_path: Path) -> None:
    write_all(tmp_path / "fisher.pt", sample_tensors())
    with zipfile.ZipFile(tmp_path / "fisher.pt") as archive:
        assert archive.testzip() is None
        stored = {info.filename: info.CRC for info in archive.infolist()}
    assert stored["fisher/data/1"] != 0


def test_checksums_reach_past_4_gb(tmp_path: Path) -> None:
    """Sparse, so nothing of that size is written; zip needs other fields from there on."""
    specs = [TensorSpec("huge", "BF16", (3_000_000_000,)), TensorSpec("last", "F32", (2,))]
    slots = lay_out(tmp_path / "m.pt", specs)
    data = b"\0\0\x80\x3f\0\0\0\x40"
    with (tmp_path / "m.pt").open("r+b") as file:
        os.pwrite(file.fileno(), data, slots[1].offset)
    write_checksums(slots, {"last": zlib.crc32(data)})
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.getinfo("m/data/1").header_offset > 2**32
        assert archive.read("m/data/1") == data
    found = torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)
    assert found["last"].tolist() == [1.0, 2.0]


def test_a_safetensors_file_is_what_its_own_library_makes(tmp_path: Path) -> None:
    """Byte for byte where the library's order (by name, within a type) is ours."""
    tensors = {"a.weight": torch.randn(3, 5).bfloat16(), "b.weight": torch.randn(2, 2).bfloat16()}
    write_all(tmp_path / "ours.safetensors", tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_mixed_types_stay_aligned_and_load_in_the_library(tmp_path: Path) -> None:
    tensors = sample_tensors()
    write_all(tmp_path / "m.safetensors", tensors)
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert all(same_bits(found[key], tensor) for key, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for info in open_index(tmp_path / "m.safetensors").tensors.values():
        assert info.nbytes == 0 or info.start % (info.nbytes // info.numel) == 0


def test_a_folder_has_shards_of_the_given_size_and_an_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"large": torch.ones(100)}
    files = write_all(tmp_path / "out", tensors, stem="fisher", shard_bytes=80)
    shards = [f"fisher-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    assert [file.name for file in files] == [*shards, "fisher.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "fisher.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 600}
    assert list(index["weight_map"].values()) == [shards[0]] * 2 + [shards[1]] * 2 + [shards[2], shards[3]]
    held = [key for shard in shards for key in safetensors.torch.load_file(tmp_path / "out" / shard)]
    assert held == list(tensors)


def test_a_folder_of_one_shard_has_an_index_too(tmp_path: Path) -> None:
    files = write_all(tmp_path / "out", {"a": torch.ones(3)})
    assert [file.name for file in files] == ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("length", [0, 1, 1000, (1 << 20) + 3])
def test_float32_is_rounded_to_the_spec_as_torch_rounds(tmp_path: Path, length: int) -> None:
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(1))
    tensor[: length // 7] *= 1e-41
    tensor[length // 2 : length // 2 + 3] = torch.tensor([NAN, float("inf"), -0.0])[: len(tensor[length // 2 :][:3])]
    with StreamedWriter.create(tmp_path / "f.pt", [TensorSpec("w", "BF16", (length,))], work=tmp_path / "w") as writer:
        writer.write("w", tensor)
        writer.finish()
    found = torch.load(tmp_path / "f.pt")["w"]
    assert same_bits(found, tensor.bfloat16())
    assert torch.equal(found.isnan(), tensor.isnan())


def test_a_view_is_written_as_it_reads(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    write_all(tmp_path / "f.safetensors", {"t": base.mT, "row": base[1]})
    found = safetensors.torch.load_file(tmp_path / "f.safetensors")
    assert torch.equal(found["t"], base.detach().mT)
    assert torch.equal(found["row"], base.detach()[1])


def test_writing_again_replaces(tmp_path: Path) -> None:
    with create(tmp_path / "f.pt", {"a": torch.ones(3)}) as writer:
        writer.write("a", torch.zeros(3))
        writer.write("a", torch.full((3,), 7.0))
        writer.finish()
    assert torch.load(tmp_path / "f.pt")["a"].tolist() == [7.0] * 3
    assert zipfile.ZipFile(tmp_path / "f.pt").testzip() is None


@pytest.mark.parametrize("name", TARGETS)
def test_threads_may_write_at_once(tmp_path: Path, name: str) -> None:
    tensors = {f"t{i}": torch.full((1000 + i,), float(i)) for i in range(40)}
    (tmp_path / "serial").mkdir()
    write_all(tmp_path / "serial" / name, tensors)
    with create(tmp_path / name, tensors) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(writer.write, tensors, tensors.values()))
        writer.finish()
    assert contents(tmp_path / name) == contents(tmp_path / "serial" / name)


@pytest.mark.parametrize(("files", "most"), [(1, 1), (2, 2)])
def test_one_thread_at_a_time_writes_to_a_file(
    files: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / str(number) for number in range(files)]
    for path in paths:
        path.touch()
    plain, inside, seen = os.pwrite, list[int](), list[int]()

    def pwrite(descriptor: int, view: memoryview, offset: int) -> int:
        inside.append(descriptor)
        seen.append(len(inside))
        assert inside.count(descriptor) == 1
        time.sleep(0.002)
        written = plain(descriptor, view, offset)
        inside.remove(descriptor)
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    opened = OpenFiles(os.O_RDWR)
    with ThreadPoolExecutor(4) as pool:
        wrote = [pool.submit(opened.write, paths[n % files], memoryview(bytes([n]) * 9), 9 * n) for n in range(40)]
        for future in wrote:
            future.result()
    opened.close()
    assert max(seen) == most
    for n in range(40):
        assert paths[n % files].read_bytes()[9 * n : 9 * n + 9] == bytes([n]) * 9


def test_writing_a_large_file_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """120 MB each; what the process holds may grow by a few tensors of 5 MB, not by all."""
    code = f"""
import resource, torch
from pathlib import Path
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def write(name, count):
    specs = [TensorSpec(f"t{{i}}", "BF16", (2_500_000,)) for i in range(count)]
    with StreamedWriter.create(Path({str(tmp_path)!r}) / name, specs, work=Path({str(tmp_path)!r}) / "w") as writer:
        for spec in specs:
            writer.write(spec.name, torch.ones(2_500_000))
        writer.finish()
for name in ("a.pt", "a.safetensors"):
    write("warm-up-" + name, 1)
before = peak()
for name in ("a.pt", "a.safetensors"):
    write(name, 24)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    assert int(done.stdout) * unit < 50e6


@pytest.mark.parametrize("name", TARGETS)
def test_permissions_are_those_of_any_other_file(tmp_path: Path, name: str) -> None:
    before = os.umask(0o027)
    try:
        files = write_all(tmp_path / name, sample_tensors())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
    if (tmp_path / name).is_dir():
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o750


# What the caller must not do


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_half_written_is_finished(tmp_path: Path, name: str) -> None:
    with create(tmp_path / name, sample_tensors()) as writer:
        writer.write("ids", sample_tensors()["ids"])
        with pytest.raises(RuntimeError, match=r"7 tensors.*'bf16'"):
            writer.finish()
    assert not (tmp_path / name).exists()


def test_a_tensor_of_another_layout_is_refused(tmp_path: Path) -> None:
    with create(tmp_path / "f.pt", {"a": torch.ones(2, 3), "i": torch.arange(3)}) as writer:
        with pytest.raises(ValueError, match="has no tensor 'b'"):
            writer.write("b", torch.ones(2, 3))
        with pytest.raises(ValueError, match="has no tensor 'b'"):
            writer.mark_written(["a", "b"])
        with pytest.raises(ValueError, match=r"'a'.*F32 \[2, 3\].*torch.float32 \[3, 2\]"):
            writer.write("a", torch.ones(3, 2))
        with pytest.raises(ValueError, match=r"I64 \[3\].*torch.float32"):
            writer.write("i", torch.ones(3))
        with pytest.raises(ValueError, match="laid out as F32"):
            writer.write("a", torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="already closed"):
        writer.write("a", torch.ones(2, 3))


@pytest.mark.parametrize("names", [[], ["a", "a"], ["__metadata__"]])
def test_every_tensor_needs_a_name_of_its_own(tmp_path: Path, names: list[str]) -> None:
    specs = [TensorSpec(name, "F32", (1,)) for name in names]
    with pytest.raises(ValueError, match="name of its own"):
        StreamedWriter.create(tmp_path / "f.pt", specs, work=tmp_path / "w")


def test_a_type_without_torch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'w'.*F4"):
        TensorSpec("w", "F4", (2,))
