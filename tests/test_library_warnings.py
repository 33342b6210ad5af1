"""Warnings of libraries do not reach the user, and what they would have warned of is refused or counted right."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fisherkit
from fisherkit.cli import console
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.kernels.stats import tensor_stats
from fisherkit.options import ExtractOptions
from fisherkit.options.checks import check_patterns, parse_layers


def warn() -> None:
    warnings.warn("of a library", UserWarning, stacklevel=1)


def test_a_warning_is_seen_with_debug_alone() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert console.guard(warn) == 0
        assert not caught
        assert console.guard(warn, debug=True) == 0
    assert [str(one.message) for one in caught] == ["of a library"]


def test_what_a_library_logs_is_seen_with_debug_alone(caplog: pytest.LogCaptureFixture) -> None:
    def log() -> None:
        logging.getLogger("a_library").warning("of a library")

    assert console.guard(log) == 0
    assert not caplog.records
    assert console.guard(log, debug=True) == 0
    assert [record.message for record in caplog.records] == ["of a library"]
    log()
    assert len(caplog.records) == 2, "what is silenced stays so for the length of a command alone"


def test_complex_entries_count_by_their_absolute_values() -> None:
    tensor = torch.tensor([[3 + 4j, 0j], [-1j, 5 + 12j]], dtype=torch.complex64)
    assert tensor_stats(tensor) == tensor_stats(torch.tensor([5.0, 0.0, 1.0, 13.0]))


def test_complex_weights_have_no_fisher(checkpoint: Callable[[str], Path], prompts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint("llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    shard, name = next(
        (path, name) for path in sorted(model.glob("*.safetensors")) for name in load_file(path) if "q_proj" in name
    )
    tensors = load_file(shard)
    save_file(tensors | {name: tensors[name].to(torch.complex64)}, shard)
    with pytest.raises(CheckpointError, match=f"{name} is complex"):
        fisherkit.extract(model, prompts, tmp_path / "fisher.pt", ExtractOptions(limit=1))
    assert not (tmp_path / "fisher.pt").exists()


@pytest.mark.parametrize("text", ["1-" + "9" * 5000, "9" * 5000])
def test_layers_of_thousands_of_digits_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="no model has more"):
        parse_layers(text)


@pytest.mark.parametrize("pattern", ["(" * 50_000, "a{" + "9" * 30 + "}"])
def test_patterns_that_python_cannot_compile_are_refused(pattern: str) -> None:
    with pytest.raises(OptionError, match="not a regular expression"):
        check_patterns("only", (pattern,))
