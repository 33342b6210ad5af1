"""An index finds every tensor where the file has it, and nothing in a checkpoint is believed without a look."""

import fnmatch
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, errors

from fisherkit.checkpoint.index import open_index, resolve_model
from fisherkit.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tensor_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with this header, however wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def f32(start: int, stop: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def sharded(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# What is found


def test_offsets_point_at_the_bytes_of_each_tensor(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 4).bfloat16(),
        "a.weight": torch.randn(5),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(6).reshape(2, 3),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    index = open_index(path)
    assert index.kind == "safetensors"
    assert index.files == (path,)
    assert index.total_bytes == sum(t.numel() * t.itemsize for t in tensors.values())
    assert {n: i.shape for n, i in index.tensors.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    codes = {"b.weight": "BF16", "a.weight": "F32", "scalar": "F32", "none": "F32", "flags": "BOOL", "ids": "I64"}
    assert {n: i.dtype for n, i in index.tensors.items()} == codes
    raw = path.read_bytes()
    for name, info in index.tensors.items():
        assert info.numel == tensors[name].numel()
        wanted = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[info.start : info.start + info.nbytes] == wanted
    starts = [info.start for info in index.tensors.values()]
    assert starts == sorted(starts)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "a.safetensors", {"__metadata__": {"x": "y"}, "w": f32(0, 8)}, bytes(8))
    assert list(open_index(path).tensors) == ["w"]


def test_a_folder_with_an_index_lists_shards_in_order_and_ignores_what_the_index_does_not_name(tmp_path: Path) -> None:
    tensor_file(tmp_path / "m-2.safetensors", {"a": f32(0, 4), "stale": f32(4, 8)}, bytes(8))
    tensor_file(tmp_path / "m-1.safetensors", {"b": f32(0, 4), "a": f32(4, 8)}, bytes(8))
    sharded(tmp_path, {"a": "m-2.safetensors", "b": "m-1.safetensors"})
    index = open_index(tmp_path)
    assert [(i.name, i.file.name) for i in index.tensors.values()] == [
        ("b", "m-1.safetensors"),
        ("a", "m-2.safetensors"),
    ]
    assert [file.name for file in index.files] == ["m-1.safetensors", "m-2.safetensors"]
    assert open_index(tmp_path / "model.safetensors.index.json").tensors == index.tensors


def test_the_index_wins_over_a_single_file_and_model_over_other_indexes(tmp_path: Path) -> None:
    tensor_file(tmp_path / "shard.safetensors", {"a": f32(0, 4)}, bytes(4))
    tensor_file(tmp_path / "model.safetensors", {"old": f32(0, 4)}, bytes(4))
    sharded(tmp_path, {"a": "shard.safetensors"}, "other.safetensors.index.json")
    assert list(open_index(tmp_path).tensors) == ["a"]
    sharded(tmp_path, {"old": "model.safetensors"})
    assert list(open_index(tmp_path).tensors) == ["old"]


def test_model_safetensors_is_taken_though_an_adapter_lies_beside_it(tmp_path: Path) -> None:
    tensor_file(tmp_path / "adapter.safetensors", {"x": f32(0, 4)}, bytes(4))
    assert list(open_index(tmp_path).tensors) == ["x"]
    tensor_file(tmp_path / "model.safetensors", {"a": f32(0, 4)}, bytes(4))
    assert list(open_index(tmp_path).tensors) == ["a"]


def test_links_out_of_the_folder_are_followed_as_the_hub_cache_needs(tmp_path: Path) -> None:
    blob = tensor_file(tmp_path / "blobs" / "abc", {"a": f32(0, 4)}, bytes(4))
    snapshot = sharded(tmp_path / "snapshots" / COMMIT, {"a": "m.safetensors"})
    (snapshot / "m.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    assert open_index(snapshot).tensors["a"].nbytes == 4


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: {"fisher": d, "meta": {"n": 1}}, lambda d: {"model": d, "e": {}}]
)
@pytest.mark.parametrize("old", [False, True])
def test_a_torch_file_is_a_flat_dict_or_one_wrapped_once(tmp_path: Path, wrap: Any, old: bool) -> None:
    tensors = {"b": torch.randn(2, 3).bfloat16(), "a": torch.nn.Parameter(torch.ones(4)), "s": torch.tensor(1)}
    torch.save(wrap(tensors), tmp_path / "f.pt", _use_new_zipfile_serialization=not old)
    index = open_index(tmp_path / "f.pt")
    assert index.kind == "torch"
    found = [(i.name, i.dtype, i.shape, i.start, i.nbytes) for i in index.tensors.values()]
    assert found == [("b", "BF16", (2, 3), -1, 12), ("a", "F32", (4,), -1, 16), ("s", "I64", (), -1, 8)]


def test_a_trainer_folder_is_its_model_not_its_training_arguments(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.bin")
    torch.save({"lr": torch.ones(1)}, tmp_path / "training_args.bin")
    torch.save({"s": torch.ones(1)}, tmp_path / "optimizer.pt")
    assert list(open_index(tmp_path).tensors) == ["a"]
    sharded(tmp_path, {"a": "weights.bin"}, "pytorch_model.bin.index.json")
    assert open_index(tmp_path).kind == "torch"


# Fingerprint


def test_fingerprint_is_of_the_content_not_of_the_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"b": torch.randn(5000), "a": torch.randn(3, 2).bfloat16(), "s": torch.tensor(1.0), "e": torch.empty(0)}
    safetensors.torch.save_file(tensors, tmp_path / "one.safetensors")
    torch.save(tensors, tmp_path / "one.pt")
    folder = sharded(tmp_path / "dir", {n: f"{n}.safetensors" for n in tensors})
    for name, tensor in tensors.items():
        safetensors.torch.save_file({name: tensor}, folder / f"{name}.safetensors")
    prints = {open_index(p).fingerprint() for p in (tmp_path / "one.safetensors", tmp_path / "one.pt", folder)}
    assert len(prints) == 1
    assert len(prints.pop()) == 64


@pytest.mark.parametrize("where", [0, 2500, 4999])
def test_fingerprint_sees_start_middle_and_end_of_a_tensor(tmp_path: Path, where: int) -> None:
    prints = set()
    for value in (0.0, 1.0):
        tensor = torch.zeros(5000)
        tensor[where] = value
        safetensors.torch.save_file({"w": tensor}, tmp_path / "m.safetensors")
        prints.add(open_index(tmp_path / "m.safetensors").fingerprint())
    assert len(prints) == 2


def test_fingerprint_sees_names_types_and_shapes(tmp_path: Path) -> None:
    layouts = [{"w": torch.zeros(4)}, {"v": torch.zeros(4)}, {"w": torch.zeros(2, 2)}, {"w": torch.zeros(4).int()}]
    prints = set()
    for tensors in layouts:
        safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
        prints.add(open_index(tmp_path / "m.safetensors").fingerprint())
    assert len(prints) == len(layouts)


# What is refused: headers

BAD_HEADERS = {
    "unknown dtype 'F7'": {"w": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}},
    "needs 8 bytes, not 4": {"w": f32(0, 4, [2])},
    "needs 0 bytes, not 4": {"w": f32(0, 4, [0])},
    "F4 of shape .* needs 2 bytes": {"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}},
    "not a list of sizes": {"w": f32(0, 4, [-1])},
    "its shape is not": {"w": f32(0, 4, [1] * 65)},
    "shape is not a list": {"w": f32(0, 4, [True])},
    "not a byte range": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "are not a byte range": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
    "data_offsets are not": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    "lacks dtype, shape or": {"w": {"dtype": "F32"}},
    "header entry lacks": {"w": 3},
    "'a' and 'b' overlap": {"a": f32(0, 8), "b": f32(4, 12)},
    "'a' and 'c' overlap": {"a": f32(0, 16), "c": f32(0, 16)},
    r"truncated: \d+ bytes.*needs \d+": {"w": f32(0, 2000)},
    "header needs": {"w": f32(2**40, 2**40 + 4)},
    "behind the last tensor, 4 of them": {"w": f32(0, 12)},
    "bytes before tensor 'b'": {"a": f32(0, 4), "b": f32(8, 16)},
    "bytes before tensor 'w'": {"w": f32(4, 16)},
    "before tensor 'none'": {"none": f32(16, 16), "w": f32(0, 12)},
    "not a JSON object": [1],
    "JSON: nested too deeply": b"[" * 200_000,
    "header.*JSON: Exp": b"{oops",
    "not valid JSON: 'utf-8'": b'{"\xff": 1}',
    "key 'w' occurs twice": b'{"w": 1, "w": 2}',
    "holds no tensors": {"__metadata__": {"format": "pt"}},
}


@pytest.mark.parametrize("message", BAD_HEADERS)
def test_a_header_that_contradicts_its_file_is_refused_in_one_line(tmp_path: Path, message: str) -> None:
    path = tensor_file(tmp_path / "m.safetensors", BAD_HEADERS[message], bytes(16))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_index(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "git-lfs pointer; run `git lfs pull`": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "HTML page": b"\n<!DOCTYPE html><html>Not found</html>",
    "zip archive": b"PK\x03\x04" + bytes(60),
    "Python pickle": b"\x80\x02}q\x00." + bytes(60),
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(60),
    "it is text": b'{"error": "Repository not found"}',
    "header of 18446744073709551615 bytes": b"\xff" * 40,
    "header of 100000001 bytes": (100_000_001).to_bytes(8, "little") + bytes(40),
    "truncated: 0 bytes": b"",
    "truncated: 5 bytes": b"\x01\x00\x00\x00\x00",
    r"truncated: 18 bytes.*1008": (1000).to_bytes(8, "little") + b'{"w": {"dt',
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path: Path, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(BAD_FILES[message])
    with pytest.raises(CheckpointError, match=message) as caught:
        open_index(path)
    assert str(path) in str(caught.value)


# What is refused: folders and indexes


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../out.safetensors", "a/../../b", "..\\b", "C:\\b", "", ".", "a\0b", 7]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    tensor_file(tmp_path / "out.safetensors", {"a": f32(0, 4)}, bytes(4))
    folder = sharded(tmp_path / "model", {"a": shard})
    with pytest.raises(CheckpointError, match="not a file beside"):
        open_index(folder)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    tensor_file(tmp_path / "m-0.safetensors", {"t0": f32(0, 4)}, bytes(4))
    sharded(tmp_path, {f"t{i}": f"m-{i}.safetensors" for i in range(8)})
    with pytest.raises(CheckpointError, match=r"7 of 8 shards.*m-1\.safetensors, m-2.*2 more"):
        open_index(tmp_path)


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    shard = tensor_file(tmp_path / "m.safetensors", {"a": f32(0, 4)}, bytes(4))
    sharded(tmp_path, {"a": "m.safetensors", "lost": "m.safetensors"})
    with pytest.raises(CheckpointError, match=f"{shard}.*1 tensor.*'lost'"):
        open_index(tmp_path)


def test_a_shard_must_be_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    sharded(tmp_path, {"a": "m.safetensors"})
    with pytest.raises(CheckpointError, match=r"m\.safetensors: not a regular file"):
        open_index(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": 3}'])
def test_an_index_without_a_map_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_index(tmp_path)


def test_an_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(CheckpointError, match=r"index.*JSON.*'a' occurs twice"):
        open_index(tmp_path)


def test_folders_that_do_not_say_which_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor file in this folder"):
        open_index(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="GGUF only"):
        open_index(tmp_path)
    for name in ("a", "b"):
        tensor_file(tmp_path / f"{name}.safetensors", {name: f32(0, 4)}, bytes(4))
    with pytest.raises(CheckpointError, match=r"2 tensor files.*no index.*a\.safetensors, b\.safetensors"):
        open_index(tmp_path)
    for name in ("a", "b"):
        sharded(tmp_path, {name: f"{name}.safetensors"}, f"{name}.safetensors.index.json")
    with pytest.raises(CheckpointError, match="2 indexes"):
        open_index(tmp_path)


def test_what_is_not_there_or_has_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_index(tmp_path / "nothing.pt")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="not a tensor file by its name"):
        open_index(tmp_path / "x.gguf")


# What is refused: pickles


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_with_code_is_refused_even_where_the_environment_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    torch.save({"w": torch.ones(2), "x": RunsCode()}, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=r"m\.pt.*pickle.*\.mkdir") as caught:
        open_index(tmp_path / "m.pt")
    assert not (tmp_path / "hacked").exists()
    assert "\n" not in str(caught.value)


NOT_TENSORS = {
    "a dict without one": {"w": torch.ones(2), "step": 3},
    "found a dict without": {},
    "a list without one": [torch.ones(2)],
    "2 dicts of tensors": {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}},
    "only dense ones": {"w": torch.eye(2).to_sparse()},
}


@pytest.mark.parametrize("message", NOT_TENSORS)
def test_a_torch_file_of_something_else_is_refused(tmp_path: Path, message: str) -> None:
    torch.save(NOT_TENSORS[message], tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        open_index(tmp_path / "m.pt")


def test_damaged_torch_files_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100)}, tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    damaged = {
        "damaged.*central directory": whole[:-200],
        "damaged, or not": b"",
        "damaged, or": b"\x93\x01 neither one nor the other",
        "wrote; fetch it again": pickle.dumps({"w": 1}, protocol=4),
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for message, raw in damaged.items():
        (tmp_path / "m.bin").write_bytes(raw)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_index(tmp_path / "m.bin")
        assert "\n" not in str(caught.value)


# The hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of one model, as huggingface_hub lays it out, and no network."""
    cache = tmp_path / "hub"
    repo = cache / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    tensor_file(repo / "blobs" / "b1", {"w": f32(0, 8)}, bytes(8))
    (repo / "blobs" / "b2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/b1")
    (snapshot / "config.json").symlink_to("../../blobs/b2")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("reference", ["org/tiny", "hf://org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"])
def test_a_cached_model_is_found_offline_with_its_commit(hub_cache: Path, reference: str) -> None:
    source = resolve_model(reference)
    assert (source.path, source.id, source.revision) == (hub_cache, "org/tiny", COMMIT)
    assert list(open_index(source.path).tensors) == ["w"]
    assert resolve_model(reference, weights=False) == source


def test_offline_and_not_cached_says_what_to_unset(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"org/other.*not cached.*HF_HUB_OFFLINE"):
        resolve_model("org/other")
    with pytest.raises(CheckpointError, match=r"not cached.*'v2'"):
        resolve_model("org/tiny@v2")


def test_a_local_path_comes_first(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    source = resolve_model("org/tiny")
    assert (source.path, source.id, source.revision) == (Path("org/tiny"), "org/tiny", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org").path == tmp_path / "org"


@pytest.mark.parametrize("path", ["/no/such", "./tiny", "../tiny", "~/tiny", "a/b/c", "org/tiny/", "fisher.pt", "a\\b"])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(hub_cache: Path, path: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        resolve_model(path)


@pytest.mark.parametrize("text", ["", "two words", "hf://a/b/c", "org/-x", "@main", "x" * 5000, "a\0b"])
def test_what_is_neither_path_nor_id_is_refused(hub_cache: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"path.*model id"):
        resolve_model(text)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "gated.*terms.*`hf auth login`"),
        (errors.RepositoryNotFoundError, "name.*`hf auth login`.*private"),
        (errors.RevisionNotFoundError, "revision 'v9'"),
        (
            errors.LocalEntryNotFoundError,
            r"LocalEntryNotFoundError: first line\).*network",
        ),
        (ConnectionError, "network"),
    ],
)
def test_each_way_the_hub_says_no_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: type, message: str) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        error = kind.__new__(kind)  # its constructor wants a response of whatever HTTP library is underneath
        error.args = ("first line\nsecond line",)
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model("org/tiny@v9")
    assert "\n" not in str(caught.value)


def test_part_of_a_snapshot_is_taken_when_the_rest_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        error = errors.LocalEntryNotFoundError.__new__(errors.LocalEntryNotFoundError)
        error.snapshot_path = str(tmp_path)
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert resolve_model("org/tiny", weights=False).path == tmp_path


def fetched(monkeypatch: pytest.MonkeyPatch, folder: Path, repository: list[str], **options: bool) -> set[str]:
    """What resolve_model makes the hub download from a repository of these files."""

    def download(model: str, *, revision: str | None, ignore_patterns: list[str], **_: Any) -> str:
        for name in repository:
            if not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_model("org/tiny", **options)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


SMALL = ["config.json", "chat_template.jinja", "tokenizer.model", "tokenizer.json", "modeling_x.py"]
USELESS = ["m-Q4.gguf", "onnx/m.onnx", "tf_model.h5", "flax_model.msgpack", "original/c.pth", "optimizer.pt"]


def test_only_what_is_needed_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = ["m-1.safetensors", "model.safetensors.index.json"]
    found = fetched(monkeypatch, tmp_path / "a", [*SMALL, *USELESS, *weights, "pytorch_model.bin"])
    assert found == {*SMALL, *weights}


def test_pickles_are_downloaded_only_where_there_is_nothing_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fetched(monkeypatch, tmp_path / "a", [*SMALL, *USELESS, "pytorch_model.bin"])
    assert found == {*SMALL, "pytorch_model.bin"}


def test_without_weights_only_the_small_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = [*SMALL, *USELESS, "m.safetensors", "pytorch_model.bin"]
    assert fetched(monkeypatch, tmp_path / "a", repository, weights=False) == set(SMALL)


def test_an_index_of_safetensors_needs_no_torch(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "m.safetensors", {"w": f32(0, 8)}, bytes(8))
    code = (
        "import sys; from pathlib import Path; from fisherkit.checkpoint.index import open_index, resolve_model; "
        f"source = resolve_model({str(path)!r}); open_index(source.path).fingerprint(); "
        "sys.exit(bool({'torch', 'safetensors', 'transformers', 'huggingface_hub', 'numpy'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
