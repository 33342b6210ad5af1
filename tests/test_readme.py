"""Every command that README shows runs, in order, as it stands there, on a small model in the demo's place."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from tiny_tokenizers import CHATML, tiny_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("fisherkit ") and not re.search(r"\b(?:MODEL|BASE|FISHER)\b", line)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo/model, prompts and chats, and the command on the PATH."""
    place = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers, config.max_position_embeddings = 12, 512
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        place / "demo" / "model"
    )
    tiny_tokenizer(CHATML).save_pretrained(place / "demo" / "model")
    tuned = transformers.AutoModelForCausalLM.from_pretrained(place / "demo" / "model", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    tuned.save_pretrained(place / "demo" / "tuned")
    tiny_tokenizer(CHATML).save_pretrained(place / "demo" / "tuned")
    tiny.write_prompts(place / "prompts.jsonl")
    chat = [{"role": "user", "content": "Name three rivers."}, {"role": "assistant", "content": "Ebro, Po, Don."}]
    (place / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    command = place / "bin" / "fisherkit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fisherkit "$@"\n')
    command.chmod(0o755)
    return place


def test_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 12


def test_readme_commands_run_as_they_stand(place: Path) -> None:
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    fisherkit = ["bash", "-c"]
    setup = (
        "fisherkit extract demo/model builtin -o fisher.pt -q; fisherkit extract demo/model prompts.jsonl -o other.pt"
    )
    for command in [setup, *COMMANDS]:
        if "jq" in command and shutil.which("jq") is None:
            command = command.split("|")[0]  # noqa: PLW2901
        command = command.replace("-o fisher.pt --resume", "-o fisher.pt --resume --force")  # noqa: PLW2901
        done = subprocess.run(
            [*fisherkit, f"set -o pipefail; {command}"],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 141), f"{command}\n{done.stderr}"
        assert done.stdout, command
        assert "Traceback" not in done.stderr, command


def test_readme_python_runs_as_it_stands(place: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (place / "python").mkdir()
    (place / "python" / "demo").symlink_to(place / "demo")
    code = block + "\nassert len(report.layers) == 12 and len(table.rows) == 7\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place / "python", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_readme_tree_names_what_is_there() -> None:
    tree = README[README.index("fisherkit/\n") :]
    tree = tree[: tree.index("```")]
    named = set(re.findall(r"(\w+)\.py", tree))
    assert named == {path.stem for path in (ROOT / "fisherkit").glob("*.py")} - {"__init__", "__main__"}
    for folder in re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / "fisherkit" / folder / "__init__.py").is_file()


def test_links_in_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
