"""A streamed file equals the one made in memory, appears only when it is whole, and destroys nothing on the way."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fisherkit.checkpoint.dtypes import dtype_code
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.layout import lay_out, write_checksums
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec, check_target
from fisherkit.errors import OutputError, ResumeError

NAN = float("nan")
TARGETS = ["fisher.pt", "fisher.safetensors", "fisher"]


def sample_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "matrix": torch.randn(7, 5, generator=generator),
        "bf16": torch.randn(11, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(6).reshape(3, 2),
        "f8": torch.randn(7, generator=generator).to(torch.float8_e4m3fn),
        'name with "quotes" and \u00fc': torch.ones(2),
    }


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, str(dtype_code(t.dtype)), tuple(t.shape)) for name, t in tensors.items()]


def work_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def create(target: Path, tensors: dict[str, Tensor], **options: Any) -> StreamedWriter:
    return StreamedWriter.create(target, specs_of(tensors), work=work_of(target), **options)


def write_all(target: Path, tensors: dict[str, Tensor], *, force: bool = False, **options: Any) -> tuple[Path, ...]:
    with create(target, tensors, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.finish(force=force)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def contents(path: Path) -> dict[str, bytes]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


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
        with pytest.raises(RuntimeError, match="7 tensors were never written, such as 'bf16'"):
            writer.finish()
    assert not (tmp_path / name).exists()


def test_a_tensor_of_another_layout_is_refused(tmp_path: Path) -> None:
    with create(tmp_path / "f.pt", {"a": torch.ones(2, 3), "i": torch.arange(3)}) as writer:
        with pytest.raises(ValueError, match="has no tensor 'b'"):
            writer.write("b", torch.ones(2, 3))
        with pytest.raises(ValueError, match="has no tensor 'b'"):
            writer.mark_written(["a", "b"])
        with pytest.raises(ValueError, match=r"'a': laid out as F32 \[2, 3\], given torch.float32 \[3, 2\]"):
            writer.write("a", torch.ones(3, 2))
        with pytest.raises(ValueError, match=r"laid out as I64 \[3\], given torch.float32"):
            writer.write("i", torch.ones(3))
        with pytest.raises(ValueError, match="laid out as F32"):
            writer.write("a", torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="already closed"):
        writer.write("a", torch.ones(2, 3))


@pytest.mark.parametrize("names", [[], ["a", "a"], ["__metadata__"]])
def test_every_tensor_needs_a_name_of_its_own(tmp_path: Path, names: list[str]) -> None:
    specs = [TensorSpec(name, "F32", (1,)) for name in names]
    with pytest.raises(ValueError, match="each with a name of its own"):
        StreamedWriter.create(tmp_path / "f.pt", specs, work=tmp_path / "w")


def test_a_type_without_torch_is_refused() -> None:
    with pytest.raises(ValueError, match="'w': torch cannot hold F4"):
        TensorSpec("w", "F4", (2,))


# Interrupted and resumed

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_checkpoint_writer import TARGETS, create, sample_tensors
for name in TARGETS:
    writer = create(Path({folder!r}) / name, sample_tensors(), shard_bytes=100)
    for key in list(sample_tensors())[:4]:
        writer.write(key, sample_tensors()[key])
    writer.sync()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_no_target_and_continues_to_the_same_bytes(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    tensors = sample_tensors()
    (tmp_path / "whole").mkdir()
    for name in TARGETS:
        target = tmp_path / name
        assert not target.exists()
        with StreamedWriter.reopen(target, specs_of(tensors), work=work_of(target), shard_bytes=100) as writer:
            writer.mark_written(list(tensors)[:4])
            for key in list(tensors)[4:]:
                writer.write(key, tensors[key])
            writer.finish()
        write_all(tmp_path / "whole" / name, tensors, shard_bytes=100)
        assert contents(target) == contents(tmp_path / "whole" / name)


@pytest.mark.parametrize("name", TARGETS)
def test_another_layout_is_not_continued(tmp_path: Path, name: str) -> None:
    target, tensors = tmp_path / name, {"a": torch.ones(30), "b": torch.ones(30)}
    with pytest.raises(ResumeError, match=f"{name}.*: not what this run would continue"):
        StreamedWriter.reopen(target, specs_of(tensors), work=work_of(target))
    create(target, tensors).close()
    for other in (
        {"a": torch.ones(30)},
        {"a": torch.ones(30), "b": torch.ones(30).int()},
        dict(reversed(tensors.items())),
    ):
        with pytest.raises(ResumeError, match="run again without --resume"):
            StreamedWriter.reopen(target, specs_of(other), work=work_of(target))
    laid_out = next(path for path in sorted(work_of(target).rglob("*")) if path.is_file())
    os.truncate(laid_out, laid_out.stat().st_size - 1)
    with pytest.raises(ResumeError, match="not what this run would continue"):
        StreamedWriter.reopen(target, specs_of(tensors), work=work_of(target))


def test_another_shard_size_is_not_continued(tmp_path: Path) -> None:
    target, tensors = tmp_path / "out", {"a": torch.ones(30), "b": torch.ones(30)}
    create(target, tensors).close()
    with pytest.raises(ResumeError, match="not what this run"):
        StreamedWriter.reopen(target, specs_of(tensors), work=work_of(target), shard_bytes=120)


@pytest.mark.parametrize("name", TARGETS)
def test_create_drops_what_an_earlier_run_left(tmp_path: Path, name: str) -> None:
    create(tmp_path / name, {"old": torch.ones(3)}, shard_bytes=1).close()
    write_all(tmp_path / name, {"a": torch.ones(3), "b": torch.ones(3)}, shard_bytes=1)
    assert sorted(open_index(tmp_path / name).tensors) == ["a", "b"]


# The disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_keeps_the_work_and_shows_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    target, tensors = tmp_path / "f.pt", {"a": torch.ones(1000), "b": torch.ones(500)}
    with create(target, tensors) as writer:
        writer.write("a", tensors["a"])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OutputError, match=r"disk full while writing .*f\.pt: 6 kB needed; .* with --resume"):
                writer.write("b", tensors["b"])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OutputError, match="disk full"):
                writer.sync()
        with pytest.raises(RuntimeError, match="'b'"):
            writer.finish()
        assert not target.exists()
        writer.write("b", tensors["b"])
        writer.finish()
    assert torch.load(target)["b"].sum() == 500


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_larger_than_the_system_allows_is_a_full_disk(tmp_path: Path, name: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"disk full while writing .*: 8 MB needed"):
            create(tmp_path / name, {"a": torch.ones(2_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_other_failures_of_the_disk_say_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with create(tmp_path / "f.safetensors", {"a": torch.ones(10)}) as writer:
        monkeypatch.setattr(os, "pwrite", broken)
        with pytest.raises(OutputError, match=r"f\.safetensors: cannot be written: Input/output error"):
            writer.write("a", torch.ones(10))


def test_what_cannot_fit_is_refused_before_the_work(tmp_path: Path) -> None:
    specs = [TensorSpec("w", "F32", (10**15,))]
    with pytest.raises(OutputError, match=r"needs 4000000\.0 GB, and .* are free"):
        StreamedWriter.create(tmp_path / "f.safetensors", specs, work=tmp_path / "w")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, real = torch.randn(1000), os.pwrite
    with create(tmp_path / "f.safetensors", {"a": tensor}) as writer:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:100], at))
        writer.write("a", tensor)
        writer.finish()
    assert same_bits(safetensors.torch.load_file(tmp_path / "f.safetensors")["a"], tensor)


# What is at the target


@pytest.mark.parametrize("name", TARGETS)
def test_an_existing_target_is_replaced_only_with_force_and_only_when_whole(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    write_all(target, {"old": torch.ones(3)}, stem="fisher")
    before = contents(target)
    with pytest.raises(OutputError, match=f"{name}: exists already; choose another name, or --force"):
        check_target(target, force=False)
    check_target(target, force=True)
    with create(target, {"new": torch.ones(4)}, stem="fisher") as writer:
        writer.write("new", torch.ones(4))
        with pytest.raises(OutputError, match="exists already"):
            writer.finish()
        assert contents(target) == before
        writer.finish(force=True)
    assert list(open_index(target).tensors) == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, name + ".partial"]


def test_force_replaces_a_folder_of_ours_with_its_sidecars(tmp_path: Path) -> None:
    write_all(tmp_path / "out", {"a": torch.ones(3)}, stem="fisher")
    for name in ("fisher.json", "layer_importance.json", "README.md"):
        (tmp_path / "out" / name).write_text("{}")
    check_target(tmp_path / "out", force=True)
    write_all(tmp_path / "out", {"a": torch.ones(3)}, stem="fisher", force=True)
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("foreign", ["config.json", "thesis.tex", "model-00001-of-00002.safetensors", "fisher.pt"])
def test_force_does_not_replace_a_folder_with_anything_else(tmp_path: Path, foreign: str) -> None:
    write_all(tmp_path / "out", {"a": torch.ones(3)}, stem="fisher")
    (tmp_path / "out" / foreign).touch()
    with pytest.raises(OutputError, match=f"holds '{foreign}', so --force does not replace this folder"):
        check_target(tmp_path / "out", force=True)


def test_force_does_not_replace_a_folder_with_folders_or_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "README.md").touch()
    with pytest.raises(OutputError, match=r"holds 'README\.md'"):
        check_target(tmp_path / "home", force=True)
    write_all(tmp_path / "out", {"a": torch.ones(3)}, stem="fisher")
    (tmp_path / "out" / "fisher.json").mkdir()
    with pytest.raises(OutputError, match=r"holds 'fisher\.json'"):
        check_target(tmp_path / "out", force=True)


def test_force_does_not_turn_files_into_folders_or_back(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a folder"):
        check_target(tmp_path / "file", force=True)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(OutputError, match="is not a file"):
        check_target(tmp_path / "folder.pt", force=True)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(OutputError, match="is not a file"):
        check_target(tmp_path / "pipe.pt", force=True)


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_target(tmp_path / "out", force=False)
    write_all(tmp_path / "out", {"a": torch.ones(3)})
    assert list(open_index(tmp_path / "out").tensors) == ["a"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    write_all(target, {"old": torch.ones(3)})
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.parent == work_of(target):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, to)

    with create(target, {"new": torch.ones(4)}) as writer:
        writer.write("new", torch.ones(4))
        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(OutputError, match="cannot be written: Input/output error"):
            writer.finish(force=True)
    assert list(open_index(target).tensors) == ["old"]
    assert list(open_index(work_of(target) / "out").tensors) == ["new"]


def test_a_target_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*missing; make it first"):
        check_target(tmp_path / "missing" / "f.pt", force=False)
    for path in (".", "..", "/"):
        with pytest.raises(OutputError, match="not a name for an output"):
            check_target(Path(path), force=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # root may write anywhere
        with pytest.raises(OutputError, match="cannot be written"):
            check_target(tmp_path / "f.pt", force=False)


@pytest.mark.parametrize("name", ["f.bin", "f.safetensor", "f.json", "f.pth"])
def test_a_suffix_that_is_not_ours_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"unknown suffix '\.\w+'; use \.pt, \.safetensors, or none for a folder"):
        check_target(tmp_path / name, force=False)
    with pytest.raises(OutputError, match="unknown suffix"):
        create(tmp_path / name, {"a": torch.ones(1)})


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "gemma-3.1b", "fisher.v2", "F.PT", "f.SafeTensors"])
def test_a_version_in_a_name_is_no_suffix_and_case_does_not_matter(tmp_path: Path, name: str) -> None:
    check_target(tmp_path / name, force=False)
    write_all(tmp_path / name, {"a": torch.ones(3)})
    assert (tmp_path / name).is_dir() == (not name.lower().startswith("f."))
    assert list(open_index(tmp_path / name).tensors) == ["a"]
