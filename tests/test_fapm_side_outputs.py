"""Reports, figures and sparse deltas are part of the run: killed or short of room, it goes on to the same files."""

import json
import os
import shutil
from pathlib import Path

import pairs
import pytest
from kills import Killed, killed_after
from pairs import Pair, cli_in, fisherkit, one_line, worked

from fisherkit.errors import OutputError, ResumeError
from fisherkit.methods.merge.fapm import fapm
from fisherkit.methods.merge.fapm_report import FapmReport
from fisherkit.methods.merge.merge import merge
from fisherkit.options import FapmOptions, MergeOptions
from fisherkit.pairs import rewrite

BESIDE = ["--sparse", "d.safetensors", "--report", "r.json", "--figure", "f.html"]


@pytest.mark.parametrize("out", ["out", None])
def test_a_killed_run_goes_on_with_its_sparse_delta(
    out: str | None, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    options = {"rest": "tuned", "skip": ("norm",)}
    fapm(*pair, out, FapmOptions(**options), sparse="d.safetensors")
    expected = pairs.files(tmp_path)
    stage = "writing" if out else "pruning"
    for steps in (1, 5, 14):
        for name in os.listdir():
            shutil.rmtree(name) if name == "out" else Path(name).unlink()
        with pytest.raises(Killed):
            fapm(*pair, out, FapmOptions(**options), sparse="d.safetensors", track=killed_after(steps, stage=stage))
        assert [name for name in os.listdir() if not name.endswith(".partial")] == []
        (work,) = Path().glob("*.partial")
        with (work / "entries.raw").open("ab") as raw:  # of a tensor whose end was not reached
            raw.write(b"half of a tensor")
        seen: list[int] = []
        fapm(
            *pair,
            out,
            FapmOptions(**options, resume=True),
            sparse="d.safetensors",
            track=lambda at, done, total, seen=seen: seen.append(done) if at == stage else None,
        )
        assert seen[0] > 0, "began anew"
        assert pairs.files(tmp_path) == expected, steps


def test_a_delta_is_not_gone_on_with_without_its_entries(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    with pytest.raises(Killed):
        fapm(*pair, "out", sparse="d.safetensors", track=killed_after(9, stage="writing"))
    os.truncate("out.partial/entries.raw", 3)
    with pytest.raises(ResumeError, match="is not what the run had put aside"):
        fapm(*pair, "out", FapmOptions(resume=True), sparse="d.safetensors")
    with pytest.raises(ResumeError, match="other options"):  # none was being made
        fapm(*pair, "out", FapmOptions(resume=True))
    fapm(*pair, "out", sparse="d.safetensors")


def test_no_room_for_a_figure_leaves_nothing_and_loses_nothing(pair: Pair, tmp_path: Path) -> None:
    words = ["fapm", *pair, "out", *BESIDE]
    first = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"  # the figure has 90 kB
    assert "disk full" in one_line(fisherkit(*words, first=first, cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    computed = "import fisherkit.pairs.prune as p; p.Pruning.by_quota = None"  # would fail
    worked(fisherkit(*words, "--resume", first=computed, cwd=tmp_path))
    (tmp_path / "whole").mkdir()
    worked(fisherkit(*words, cwd=tmp_path / "whole"))
    expected = pairs.files(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    assert pairs.files(tmp_path) == expected


def test_what_is_there_is_refused_at_once_and_never_replaced(pair: Pair, tmp_path: Path) -> None:
    for words, name in ((BESIDE, "r.json"), (BESIDE, "f.html"), (BESIDE, "d.safetensors"), (BESIDE, "d.json")):
        (tmp_path / name).write_text("{}")
        line = one_line(cli_in(tmp_path, "fapm", *pair, "out", *words))
        assert f"{name}: exists already" in line
        assert pairs.files(tmp_path) == {name: b"{}"}
        (tmp_path / name).unlink()


def test_what_appears_during_the_run_is_not_replaced_and_nothing_is_lost(pair: Pair, tmp_path: Path) -> None:
    def make(report: FapmReport) -> bytes:
        (tmp_path / "r.json").write_text("somebody else's")
        return b"report"

    def never(report: FapmReport) -> bytes:
        raise AssertionError("made twice")

    out, report = tmp_path / "out", tmp_path / "r.json"
    with pytest.raises(OutputError, match="exists already"):
        fapm(*pair, out, beside={report: make})
    assert report.read_text() == "somebody else's"
    assert not out.exists()
    with pytest.raises(OutputError, match="exists already"):
        fapm(*pair, out, beside={report: lambda _: b"report"})
    report.unlink()
    fapm(*pair, out, beside={report: lambda _: b"report"}, track=killed_after(1, stage="writing"))  # computes nothing
    assert report.read_bytes() == b"report"
    assert pairs.is_whole(out)
    assert not (tmp_path / "out.partial").exists()


def test_a_forced_run_that_was_killed_may_replace_what_it_might_have(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    out, report = tmp_path / "out", tmp_path / "r.json"
    merge(*pair, out, MergeOptions(alpha=0.25))
    older = pairs.files(out)
    report.write_text("older")
    options = {"alpha": 0.5}
    with pytest.raises(Killed):
        merge(
            *pair,
            out,
            MergeOptions(**options, force=True),
            beside={report: lambda _: b"new"},
            track=killed_after(9, stage="writing"),
        )
    with pytest.raises(OutputError, match="exists already"):
        merge(*pair, out, MergeOptions(**options), beside={report: lambda _: b"new"})
    assert (pairs.files(out), report.read_text()) == (older, "older")
    merge(*pair, out, MergeOptions(**options, resume=True), beside={report: lambda _: b"new"})
    assert report.read_text() == "new"
    assert pairs.files(out) != older


def test_reports_of_one_name_in_two_folders_and_on_two_file_systems(pair: Pair, tmp_path: Path) -> None:
    other = Path("/dev/shm")  # noqa: S108
    places = [tmp_path / "a", tmp_path / "b"]
    if other.is_dir() and other.stat().st_dev != tmp_path.stat().st_dev and os.access(other, os.W_OK):
        places.append(other / f"fisherkit-test-{os.getpid()}")
    try:
        for place in places:
            place.mkdir()
        fapm(*pair, tmp_path / "out", beside={place / "r.txt": lambda _, p=place: str(p).encode() for place in places})
        assert [(place / "r.txt").read_text() for place in places] == [str(place) for place in places]
        assert [os.listdir(place) for place in places] == [["r.txt"]] * len(places)
    finally:
        for place in places[2:]:
            shutil.rmtree(place)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": {"no.such.tensor": {}}},
        {"rows": {"model.norm.weight": {"kept": "all"}}},
        {"rows": []},
        {"finished": ["output/out"]},
        {"finished": 7},
        {"delta": {"bytes": -1, "tensors": []}},
        {"delta": {"bytes": 0, "tensors": [["a", "NO", -3]]}},
        {"may_replace": "yes"},
        {"fingerprint": None},
    ],
    ids=str,
)
def test_a_progress_that_does_not_add_up_is_refused_and_a_new_run_starts_over(
    change: dict[str, object], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "_COMMIT_SECONDS", 0)
    words = ["fapm", *pair, "out", "--sparse", "d.safetensors"]
    with pytest.raises(Killed):
        fapm(*pair, tmp_path / "out", sparse=tmp_path / "d.safetensors", track=killed_after(9, stage="writing"))
    progress = tmp_path / "out.partial" / "progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | change))
    line = one_line(cli_in(tmp_path, *words, "--resume"))
    assert "progress" in line
    assert not (tmp_path / "out").exists()
    if "output/out" not in str(change):
        worked(cli_in(tmp_path, *words))
