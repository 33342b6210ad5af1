"""Streamed files that are interrupted, that fill the disk, or that find something at their place."""

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import fork_server
import pytest
import safetensors.torch
import torch
from stored import TARGETS, contents, create, same_bits, sample_tensors, specs_of, work_of, write_all

from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec, check_target
from fisherkit.errors import OutputError, ResumeError

# Interrupted and resumed

KILLED = """
import os, signal, sys
sys.path.insert(0, {support!r})
from pathlib import Path
from stored import TARGETS, create, sample_tensors
for name in TARGETS:
    writer = create(Path({folder!r}) / name, sample_tensors(), shard_bytes=100)
    for key in list(sample_tensors())[:4]:
        writer.write(key, sample_tensors()[key])
    writer.sync()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_no_target_and_continues_to_the_same_bytes(tmp_path: Path) -> None:
    code = KILLED.format(support=str(Path(__file__).parent / "support"), folder=str(tmp_path))
    assert fork_server.run(["-c", code]).returncode == -signal.SIGKILL
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
    with pytest.raises(ResumeError, match=f"{name}.*not what this run"):
        StreamedWriter.reopen(target, specs_of(tensors), work=work_of(target))
    create(target, tensors).close()
    for other in (
        {"a": torch.ones(30)},
        {"a": torch.ones(30), "b": torch.ones(30).int()},
        dict(reversed(tensors.items())),
    ):
        with pytest.raises(ResumeError, match="without --resume"):
            StreamedWriter.reopen(target, specs_of(other), work=work_of(target))
    laid_out = next(path for path in sorted(work_of(target).rglob("*")) if path.is_file())
    os.truncate(laid_out, laid_out.stat().st_size - 1)
    with pytest.raises(ResumeError, match="not what this run"):
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
            with pytest.raises(OutputError, match=r"disk full.*f\.pt.*6 kB.*--resume"):
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
        with pytest.raises(OutputError, match=r"disk full.*8 MB"):
            create(tmp_path / name, {"a": torch.ones(2_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_other_failures_of_the_disk_say_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with create(tmp_path / "f.safetensors", {"a": torch.ones(10)}) as writer:
        monkeypatch.setattr(os, "pwrite", broken)
        with pytest.raises(OutputError, match=r"f\.safetensors.*Input/output error"):
            writer.write("a", torch.ones(10))


def test_what_cannot_fit_is_refused_before_the_work(tmp_path: Path) -> None:
    specs = [TensorSpec("w", "F32", (10**15,))]
    with pytest.raises(OutputError, match=r"needs 4 PB.*free"):
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
    with pytest.raises(OutputError, match=f"{name}: exists already.*--force"):
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
    with pytest.raises(OutputError, match=f"'{foreign}'.*--force"):
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
        with pytest.raises(OutputError, match="Input/output error"):
            writer.finish(force=True)
    assert list(open_index(target).tensors) == ["old"]
    assert list(open_index(work_of(target) / "out").tensors) == ["new"]


def test_a_target_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"no folder .*missing"):
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
    with pytest.raises(OutputError, match=r"suffix '\.\w+'.*\.pt, \.safetensors.*folder"):
        check_target(tmp_path / name, force=False)
    with pytest.raises(OutputError, match="unknown suffix"):
        create(tmp_path / name, {"a": torch.ones(1)})


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "gemma-3.1b", "fisher.v2", "F.PT", "f.SafeTensors"])
def test_a_version_in_a_name_is_no_suffix_and_case_does_not_matter(tmp_path: Path, name: str) -> None:
    check_target(tmp_path / name, force=False)
    write_all(tmp_path / name, {"a": torch.ones(3)})
    assert (tmp_path / name).is_dir() == (not name.lower().startswith("f."))
    assert list(open_index(tmp_path / name).tensors) == ["a"]
