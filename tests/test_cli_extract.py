"""What extract says on the way: a line at once, the model's name before the output's, one group of four layers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fisherkit.errors import CheckpointError, OutputError
from fisherkit.methods.extract.measure import extract
from fisherkit.options import ExtractOptions

Checkpoint = Callable[[str], Path]


def test_the_model_is_looked_up_before_the_output_is_refused(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "fisher.pt"
    taken.write_text("mine")
    with pytest.raises(CheckpointError, match="nowhere"):
        extract(tmp_path / "nowhere", prompts, taken)
    with pytest.raises(OutputError, match="exists already"):
        extract(checkpoint("llama"), prompts, taken)
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("group_size", "words"), [(8, "1 group of 3 layers"), (2, "2 groups of 2 layers"), (1, "3 groups of 1 layer")]
)
def test_numbers_and_nouns_agree(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, group_size: int, words: str
) -> None:
    lines: list[str] = []
    options = ExtractOptions(group_size=group_size, limit=1)
    extract(checkpoint("llama"), prompts, tmp_path / "f.pt", options, say=lines.append)
    assert any(line.endswith(words) for line in lines)


def test_the_size_of_a_head_is_noted_for_drawings_of_masks(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    report = extract(checkpoint("llama"), prompts, tmp_path / "f.pt", ExtractOptions(limit=1))
    assert isinstance(report.provenance["model"]["head_dim"], int)


def test_heads_whose_size_varies_by_layer_have_none(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    report = extract(checkpoint("gemma4-e2b"), prompts, tmp_path / "f.pt", ExtractOptions(limit=1))
    assert report.provenance["model"]["head_dim"] is None
