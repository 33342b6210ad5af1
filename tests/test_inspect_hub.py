"""inspect takes a model of the Hub by its id, as extract does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from fisherkit import inspect
from fisherkit.errors import CheckpointError

COMMIT = "1234567890abcdef" * 2 + "12345678"


def cached(hub: Path, model: Path) -> None:
    """Lay a folder out as the Hub's cache does."""
    root = hub / "models--org--name"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)


def test_a_model_of_the_hub_is_inspected_by_its_id(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("llama")
    cached(tmp_path / "hub", model)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", f"org/name@{COMMIT}"):
        assert inspect(name).rows == inspect(model).rows
    assert inspect(model, "org/name").comparison is not None
    with pytest.raises(CheckpointError, match="org/other"):
        inspect("org/other")


@pytest.mark.parametrize("name", ["absent", "runs/fisher.pt", "./org/name", "a/b/c"])
def test_a_path_that_is_no_id_is_a_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(name)
