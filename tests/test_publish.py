"""The files of an output appear as one: killed before any of the renames, a run goes on to the same bytes."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fisher_files import write_fisher
from kills import Killed

import fisherkit
from fisherkit.checkpoint import atomic
from fisherkit.checkpoint.atomic import json_text, publish, size_text, write_json, write_text
from fisherkit.checkpoint.work_folder import Work
from fisherkit.errors import OptionError, OutputError, ResumeError
from fisherkit.options import ExtractOptions, MaskOptions

Checkpoint = Callable[[str], Path]


def kill_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Kill the run before its so-many-th file is put in its place."""
    left, real = iter(range(number)), atomic.swap_in

    def swap_in(staged: Path, target: Path) -> None:
        if next(left, None) is None:
            raise Killed
        real(staged, target)

    monkeypatch.setattr(atomic, "swap_in", swap_in)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below; JSON without what the clock says."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            known = json.loads(path.read_bytes())
            known.pop("created", None)
            known.get("run", {}).pop("seconds", None) if isinstance(known.get("run"), dict) else None
            (known.get("fisher") or {}).pop("created", None) if isinstance(known.get("fisher"), dict) else None
            found[path.relative_to(folder).as_posix()] = json.dumps(known).encode()
        else:
            found[path.relative_to(folder).as_posix()] = path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.parametrize("statistics", ["fisher", "activations"])
@pytest.mark.parametrize("name", ["fisher.pt", "fisher.safetensors", "folder"])
def test_a_fisher_killed_between_its_renames_goes_on_to_the_same_files(
    name: str, statistics: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"group_size": 2, "statistics": statistics}
    (tmp_path / "whole").mkdir()
    fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "whole" / name, ExtractOptions(**settings))
    expected = contents(tmp_path / "whole")
    renames = 1 if name == "folder" else 3 if statistics == "fisher" else 5
    for number in range(renames):
        out = tmp_path / str(number) / name
        out.parent.mkdir()
        with monkeypatch.context() as patch:
            kill_at_rename(patch, number)
            with pytest.raises(Killed):
                fisherkit.extract(checkpoint("llama"), prompts, out, ExtractOptions(**settings))
        assert not out.exists(), "the Fisher comes last"
        report = fisherkit.extract(checkpoint("llama"), prompts, out, ExtractOptions(**settings, resume=True))
        assert contents(out.parent) == expected
        assert {path.relative_to(out.parent).as_posix() for path in report.files} == {
            name for name, content in expected.items() if content is not None
        }


def test_an_older_fisher_is_replaced_by_force_alone_also_when_killed_in_between(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = checkpoint("llama"), tmp_path / "fisher.pt"
    fisherkit.extract(model, prompts, out, ExtractOptions(reduction="sum"))
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 2)
        with pytest.raises(Killed):
            fisherkit.extract(model, prompts, out, ExtractOptions(force=True))
    fisherkit.extract(model, prompts, out, ExtractOptions(resume=True))  # it was told to replace
    assert json.loads((tmp_path / "fisher.json").read_text())["estimator"]["reduction"] == "mean"
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 2)
        with pytest.raises(Killed):
            fisherkit.extract(model, prompts, tmp_path / "b.pt", ExtractOptions())
    (tmp_path / "b.pt").write_text("mine")
    with pytest.raises(OutputError, match=r"b\.pt: exists already"):
        fisherkit.extract(model, prompts, tmp_path / "b.pt", ExtractOptions(resume=True))
    assert (tmp_path / "b.pt").read_text() == "mine"


@pytest.mark.parametrize("left", [("progress.json", "lock"), ("lock",), ()])
def test_a_run_killed_while_it_tidies_up_is_finished_and_says_so(
    left: tuple[str, ...], checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = checkpoint("llama"), tmp_path / "fisher.pt"

    def kill(work: Work) -> None:
        for path in list(work.folder.iterdir()):
            if path.name not in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Work, "remove", kill)
        with pytest.raises(Killed):
            fisherkit.extract(model, prompts, out)
    written = out.read_bytes()
    for _ in range(2):
        report = fisherkit.extract(model, prompts, out, ExtractOptions(resume=True))
        assert report.files[0] == out
        assert out.read_bytes() == written
        assert not out.with_name("fisher.pt.partial").exists()
    with pytest.raises(OutputError, match="exists already"):
        fisherkit.extract(model, prompts, out, ExtractOptions(resume=True, reduction="sum"))


def test_a_finished_output_is_replaced_by_no_work_folder_of_another_run(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = checkpoint("llama"), tmp_path / "fisher.pt"
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 0)
        with pytest.raises(Killed):
            fisherkit.extract(model, prompts, out, ExtractOptions(reduction="sum"))
    out.write_text("mine")
    with pytest.raises(ResumeError, match="other options"):
        fisherkit.extract(model, prompts, out, ExtractOptions(resume=True))
    out.with_name("fisher.pt.partial").rename(tmp_path / "aside")
    out.with_name("fisher.pt.partial").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        fisherkit.extract(model, prompts, out, ExtractOptions(resume=True))
    assert out.read_text() == "mine"


def test_a_run_that_another_one_overtook_is_refused_before_its_work(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "fisher.pt", []
    real = Work.start.__func__  # type: ignore[attr-defined]

    def start(folder: Path, fingerprint: Any, **more: Any) -> Work:
        out.write_text("the other run's")
        return real(Work, folder, fingerprint, **more)  # type: ignore[no-any-return]

    monkeypatch.setattr(Work, "start", start)
    with pytest.raises(OutputError, match="exists already"):
        fisherkit.extract(checkpoint("llama"), prompts, out, track=lambda *step: steps.append(step))
    assert steps == []
    assert out.read_text() == "the other run's"


def test_importance_of_a_fisher_that_finished_meanwhile_is_left_alone(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    common = tmp_path / "layer_importance.json"

    def track(stage: str, done: int, total: int) -> None:
        if not common.exists():
            common.write_text('{"fisher": "other.pt", "layers": []}')

    report = fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt", track=track)
    assert json.loads(common.read_text())["fisher"] == "other.pt"
    assert tmp_path / "fisher.layer_importance.json" in report.files


def test_a_foreign_importance_under_the_fishers_name_is_not_replaced(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "layer_importance.json").write_text("[1, 2]")
    (tmp_path / "fisher.layer_importance.json").write_text("[3]")
    with pytest.raises(OutputError, match=r"fisher\.layer_importance\.json: exists already"):
        fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "fisher.pt", ExtractOptions(force=True))
    assert (tmp_path / "fisher.layer_importance.json").read_text() == "[3]"


@pytest.mark.parametrize("options", [{"keep": 0.3, "train": "top", "aggregate": "none"}, {"svd_rank": 2}])
def test_a_mask_killed_between_its_renames_is_made_by_the_same_command(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fisher = write_fisher(tmp_path / "fisher.safetensors")
    (tmp_path / "whole").mkdir()
    fisherkit.mask(fisher, tmp_path / "whole" / "mask.safetensors", MaskOptions(**options))
    for number in (0, 1):
        out = tmp_path / str(number) / "mask.safetensors"
        out.parent.mkdir()
        with monkeypatch.context() as patch:
            kill_at_rename(patch, number)
            with pytest.raises(Killed):
                fisherkit.mask(fisher, out, MaskOptions(**options))
        assert not out.exists(), "the mask comes last"
        fisherkit.mask(fisher, out, MaskOptions(**options))
        assert contents(out.parent) == contents(tmp_path / "whole")


# The primitive


def test_publishing_twice_is_publishing_once(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    files = [(staging / name, tmp_path / name) for name in ("a", "b")]
    for staged, _ in files:
        staged.write_text(staged.name)
    publish(files[:1])
    publish(files)
    assert [target.read_text() for _, target in files] == ["a", "b"]
    assert list(staging.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"a": [1.0, float("nan")]}, r"a\[1\] is nan"),
        ({"a": {"b": float("inf")}}, r"a\.b is inf"),
        ({"a": object()}, "a is <object"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(
    content: dict[str, Any], where: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    for write in (write_json, json_text):
        with pytest.raises(OutputError, match=where):
            write(path, content)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_what_was_there(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(number, "the system's word")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OutputError, match="disk full" if number == errno.ENOSPC else "the system's word"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_what_a_killed_write_left_is_dropped_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".x.json.123.new").write_text("half")
    (tmp_path / ".x.json.notes").write_text("the user's")
    write_text(tmp_path / "x.json", "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".x.json.notes", "x.json"]


def test_nan_among_the_options_is_refused_before_the_work() -> None:
    with pytest.raises(OptionError, match="chat-template-kwargs"):
        ExtractOptions(chat_template_kwargs={"a": float("nan")})


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (999.6, "1 kB"), (1000, "1 kB"), (97_700, "97.7 kB"), (10**6, "1 MB"),
        (999_600_000, "1 GB"), (80.25e9, "80.2 GB"), (1.5e12, "1.5 TB"), (4e15, "4 PB"), (1e19, "10,000 PB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits_in_the_unit_that_fits(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text
