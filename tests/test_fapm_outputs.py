"""Outputs of fapm and merge: on a full disk, and where something lies already.

What is not finished never looks finished, and nothing of the user's is replaced.
"""

import os
import shutil
from pathlib import Path

import pairs
import pytest
from kills import Killed, killed_after
from pairs import Pair, cli, cli_in, fisherkit, one_line, worked

from fisherkit.methods.merge.fapm import fapm
from fisherkit.options import FapmOptions

Q0 = "model.layers.0.self_attn.q_proj.weight"


# The disk


@pytest.mark.parametrize("limit", [1, 4000, 30_000])
@pytest.mark.parametrize("target", ["out", "--sparse", "out.safetensors"])
def test_a_full_disk_is_one_line_and_a_second_run_gets_there(
    limit: int, target: str, pair: Pair, tmp_path: Path
) -> None:
    words = ["fapm", *pair, *(["--sparse", "d.safetensors", "--density", "1"] if target == "--sparse" else [target])]
    first = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    line = one_line(fisherkit(*words, first=first, cwd=tmp_path))
    assert "disk full" in line
    assert not [path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")]
    for again in ("--resume", "--force"):
        worked(cli_in(tmp_path, *words, again))
        assert not list(tmp_path.glob("*.partial"))
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_no_room_is_said_before_the_work(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    line = one_line(cli("fapm", *pair, tmp_path / "out"))
    assert "out: needs 97.7 kB, and 5 kB are free on this disk" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(pair: Pair, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in one_line(cli("fapm", *pair, tmp_path / "out"))
    tmp_path.chmod(0o700)


# Outputs that must not be touched


def test_inputs_are_never_written_to(pair: Pair, tmp_path: Path) -> None:
    base, tuned = (shutil.copytree(one, tmp_path / one.name) for one in pair)
    before = pairs.files(tmp_path)
    (tmp_path / "link").symlink_to(base)
    for out in (base, tuned, base / "new", tuned / "a", tmp_path, tmp_path / "link"):
        line = one_line(cli("fapm", base, tuned, out, "--force"))
        assert "itself, or one lies inside of the other; choose another output" in line
    for option, path in (
        ("--report", tuned / "config.json"),
        ("--sparse", base / "model-00001-of-00003.safetensors"),
        ("--sparse", base / "config.safetensors"),  # whose description would be config.json
    ):
        line = one_line(cli("fapm", base, tuned, option, path, "--force"))
        assert "belongs to an input; choose another name" in line
    file = pairs.one_file(base, tmp_path / "file.safetensors")
    bits = file.read_bytes()
    for words in ([file], ["--sparse", file]):
        one_line(cli("fapm", file, tuned, *words, "--force"))
    assert file.read_bytes() == bits
    file.unlink()
    (tmp_path / "link").unlink()
    assert pairs.files(tmp_path) == before


def test_a_side_in_the_work_folder_is_not_dropped_with_it(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fapm(*pair, tmp_path / "out", track=killed_after(9, stage="writing"))
    tuned = shutil.copytree(pair[1], tmp_path / "out.partial" / "mine")
    assert "FT lies in" in one_line(cli("fapm", pair[0], tuned, tmp_path / "out"))
    assert pairs.is_whole(tuned)


def test_outputs_of_one_run_do_not_overlap(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for words, what in (
        (["--sparse", "out.safetensors", "--report", "out.json"], "would be written twice"),
        (["out.safetensors", "--sparse", "out.safetensors"], "lies in out.safetensors"),
        (["out", "--report", "out/report.json"], "put it beside it"),
        (["out", "--figure", "out/figure.svg"], "put it beside it"),
        (["out", "--sparse", "out/delta.safetensors"], "put it beside it"),
    ):
        assert what in one_line(cli_in(tmp_path, "fapm", *pair, *words))
    assert pairs.files(tmp_path) == {}


def test_force_replaces_what_is_fisherkits_and_nothing_else(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    worked(cli("fapm", *pair, out, "--density", "0.5", "--max-shard-size", "9kB"))
    older = pairs.files(out)
    assert "exists already; choose another name, or --force" in one_line(cli("fapm", *pair, out))
    assert pairs.files(out) == older
    for name in ("notes.txt", "sub/notes.txt", "model-00001-of-00003.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
        line = one_line(cli("fapm", *pair, out, "--force"))
        assert f"holds '{name}', so --force does not replace this folder" in line
        assert (out / name).read_text() == "precious"
        (out / name).unlink()
    assert pairs.files(out) == older
    with pytest.raises(Killed):
        fapm(*pair, out, FapmOptions(force=True), track=killed_after(9, stage="writing"))
    assert pairs.files(out) == older  # until the new one is whole
    worked(cli("fapm", *pair, out, "--force"))
    assert len(list(out.glob("*.safetensors"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    worked(cli("merge", *pair, out, "--force", "--alpha", "0.5"))  # one of the other command is fisherkit's as well


def test_folders_of_others_are_never_replaced(pair: Pair, tmp_path: Path) -> None:
    model = shutil.copytree(pair[1], tmp_path / "model")
    before = pairs.files(model)
    for flags in ([], ["--force"], ["--resume"]):
        one_line(cli("fapm", *pair, model, *flags))
    assert pairs.files(model) == before
    (tmp_path / "file").write_text("precious")
    assert "what is there is not a folder" in one_line(cli("fapm", *pair, tmp_path / "file", "--force"))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    for flags in ([], ["--force"], ["--resume"]):
        line = one_line(cli("fapm", *pair, tmp_path / "out", *flags))
        assert "in the way and no work folder of ours" in line
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    worked(cli("fapm", *pair, tmp_path / "empty"))


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ("out.pt", "models are written as safetensors"),
        ("out.bin", "models are written as safetensors"),
        ("out.safetensor", "models are written as safetensors"),
        ("a/b", "there is no folder a; make it first"),
        (".", "not a name for an output"),
        ("", "not a name for an output"),
    ],
)
def test_outputs_that_could_not_be_made_are_refused_at_once(out: str, what: str, pair: Pair, tmp_path: Path) -> None:
    assert what in one_line(cli_in(tmp_path, "fapm", *pair, out))
    assert list(tmp_path.iterdir()) == []
