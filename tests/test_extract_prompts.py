"""Prompts on the command line: several files, what is said about them, broken templates and tokenizers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pairs import fisherkit, one_line

from fisherkit.errors import OutputError
from fisherkit.methods.extract.dry_run import plan_extract
from fisherkit.methods.extract.measure import extract
from fisherkit.prompts.sources import input_files

Checkpoint = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of questions with answers in a column of an odd name."""
    for name, question in (("a", "hello"), ("b", "one two")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": question, "gold": "Yes."}) + "\n")
    return tmp_path


def test_several_files_a_pattern_and_a_folder_are_one_set(checkpoint: Checkpoint, folder: Path) -> None:
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    model = checkpoint("llama")
    # The rate is given, not measured, so that the plans are alike.
    plans = [plan_extract(model, source, flops=1e9) for source in (files, folder, f"{folder}/*.jsonl")]
    assert [plan["samples"] for plan in plans] == [2, 2, 2]
    done = fisherkit("extract", model, *files, "--dry-run", "--json", "--flops", "1G")
    there = {"memory_bytes"}  # which other programs share
    assert {k: v for k, v in json.loads(done.stdout).items() if k not in there} == {
        k: v for k, v in plans[0].items() if k not in there
    }
    assert done.stderr.count("'gold' looks like an answer and is not read") == 1


def test_the_option_that_is_proposed_reads_the_answer(checkpoint: Checkpoint, folder: Path) -> None:
    arguments = ("extract", checkpoint("llama"), folder / "a.jsonl", "--dry-run")
    option = fisherkit(*arguments).stderr.partition("--field ")[2].split()[0]
    assert option == "prompt=prompt,completion=gold"
    done = fisherkit(*arguments, "--field", option)
    assert (done.returncode, "looks like" in done.stderr) == (0, False)
    assert "--field" in one_line(fisherkit(*arguments, "--field", "promt=a"), 2)


@pytest.mark.parametrize("source", ["a.jsonl", "*.jsonl", ""])
def test_no_output_replaces_a_file_of_the_prompts(checkpoint: Checkpoint, folder: Path, source: str) -> None:
    shutil.copy(folder / "a.jsonl", folder / "c.jsonl")
    prompts = folder / source
    assert folder / "a.jsonl" in input_files(prompts)
    (folder / "fisher.pt").symlink_to(folder / "a.jsonl")
    with pytest.raises(OutputError):
        extract(checkpoint("llama"), prompts, folder / "fisher.pt")
    assert json.loads((folder / "a.jsonl").read_text())["prompt"] == "hello"


def test_sources_that_are_no_files_are_none_of_the_inputs(folder: Path) -> None:
    assert input_files(["builtin", "-", "org/name", folder / "a.jsonl"]) == [folder / "a.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("tokenizer.json", "{", "no tokenizer that transformers can load"),
        ("tokenizer_config.json", "[]", "no tokenizer that transformers can load"),
        ("chat_template.jinja", "{% nonsense %}", "refused by the chat template"),
        ("chat_template.jinja", "{{ 9 ** 9 ** 9 ** 9 }}", "computes powers"),
    ],
)
def test_broken_files_beside_a_model_are_one_line(
    checkpoint: Checkpoint, folder: Path, name: str, content: str, word: str
) -> None:
    model = folder / "model"
    shutil.copytree(checkpoint("llama"), model)
    (model / name).write_text(content)
    line = one_line(fisherkit("extract", model, folder / "a.jsonl", "-o", folder / "fisher.pt"), 1)
    assert word in line
    assert len(line) <= 310
    assert not list(folder.glob("fisher*"))
