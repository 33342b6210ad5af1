"""A mask that was killed while its work folder was removed is made again without --force, and only by the same run."""

import shutil
from pathlib import Path

import pytest
from fisher_files import fisher_tensors, write_fisher
from kills import Killed

import fisherkit
from fisherkit.checkpoint.atomic import write_json
from fisherkit.checkpoint.work_folder import Work
from fisherkit.errors import OutputError
from fisherkit.options import MaskOptions

OPTIONS = MaskOptions(train="top", keep=0.3)


def killed_while_tidying(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return a Fisher, and a whole mask of it beside which a work folder is left."""
    fisher, out = write_fisher(folder / "fisher.safetensors"), folder / "mask.safetensors"

    def die(work: Work) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Work, "remove", die)
        with pytest.raises(Killed):
            fisherkit.mask(fisher, out, OPTIONS)
    return fisher, out


@pytest.mark.parametrize("is_progress_left", [True, False])
def test_the_same_run_again_ends_as_an_undisturbed_one(
    is_progress_left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fisher, out = killed_while_tidying(tmp_path, monkeypatch)
    if not is_progress_left:
        shutil.rmtree(f"{out}.partial")
        Path(f"{out}.partial").mkdir()
    whole = out.read_bytes()
    fisherkit.mask(fisher, out, OPTIONS)
    assert out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fisher.json",
        "fisher.safetensors",
        "mask.json",
        "mask.safetensors",
    ]
    with pytest.raises(OutputError, match="exists already"):
        fisherkit.mask(fisher, out, OPTIONS)


def test_other_options_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fisher, out = killed_while_tidying(tmp_path, monkeypatch)
    whole = out.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        fisherkit.mask(fisher, out, MaskOptions(train="top", keep=0.4))
    assert out.read_bytes() == whole


def test_another_fisher_of_the_same_name_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fisher, out = killed_while_tidying(tmp_path, monkeypatch)
    whole = out.read_bytes()
    write_fisher(fisher, fisher_tensors(seed=1))
    with pytest.raises(OutputError, match="exists already"):
        fisherkit.mask(fisher, out, OPTIONS)
    assert out.read_bytes() == whole


def test_a_mask_described_by_something_else_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fisher, out = killed_while_tidying(tmp_path, monkeypatch)
    write_json(out.with_suffix(".json"), {"mine": 1})
    with pytest.raises(OutputError, match="exists already"):
        fisherkit.mask(fisher, out, OPTIONS)


def test_a_mask_without_its_json_is_read_with_a_note(tmp_path: Path) -> None:
    out = tmp_path / "mask.safetensors"
    fisherkit.mask(write_fisher(tmp_path / "fisher.safetensors"), out, MaskOptions(preset="fggm"))
    assert not any("no JSON" in note for note in fisherkit.inspect(out).notes)
    out.with_suffix(".json").unlink()
    assert any("no JSON beside it" in note for note in fisherkit.inspect(out).notes)
