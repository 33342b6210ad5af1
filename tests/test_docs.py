"""README and docs/ say what is true: their commands and Python run as they stand, links lead somewhere, names exist.

Blocks of a page run in order, in a folder of the page's own. In it ``demo/`` is a small model in place of the one that
``make demo`` trains. ``sh``: a script, run by bash. ``console``: commands behind ``$``, and of what they print the
lines that matter, in order, whatever their numbers. ``python``: a program. Any other block is only shown.
"""

import ast
import json
import os
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path

import on_path
import pytest
import tiny
import torch
import transformers
import typer.main
from tiny_tokenizers import CHATML, tiny_tokenizer

from fisherkit.cli import app
from fisherkit.methods.demo import held_out

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
TEXT = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
BLOCKS = {
    name: re.findall(r"^```(sh|console|python)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for name, text in TEXT.items()
}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group

# These need a network or hours; what they call is there, see below.
NOT_HERE = re.compile(r"^(make |pip install |git clone |torchrun )")
# A pipe whose reader goes away early (141) is what `| head` does.
STRICT = "set -o pipefail; trap 'code=$?; [ $code = 141 ] || { echo \"failed: $BASH_COMMAND\" >&2; exit 1; }' ERR\n"


@pytest.fixture(scope="module")
def search_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with ``fisherkit`` and ``python`` that start at once."""
    return on_path.put(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def demo(search_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ``demo/``: 12 blocks in bf16 with a chat template, a fine-tune, a Fisher, and two prompt sets."""
    folder = tmp_path_factory.mktemp("made") / "demo"
    text = (ROOT / "fisherkit" / "prompts" / "builtin_prompts.txt").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(CHATML).train_new_from_iterator(text.splitlines(), 3000)
    torch.manual_seed(0)
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers, config.max_position_embeddings, config.vocab_size = 12, 512, len(tokenizer)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("model", "tuned"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    held_out.write_sets(folder, rows=6)
    held_out.write_learnt(folder, rows=6)
    run("fisherkit extract demo/model builtin -o demo/fisher.pt --limit 20", folder.parent, search_path)
    return folder


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_what_a_page_shows_runs_as_it_stands(page: str, demo: Path, search_path: str, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "demo")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for kind, block in BLOCKS[page]:
        if kind == "console":
            check_console(block, tmp_path, search_path)
        elif kind == "python":
            (tmp_path / "block.py").write_text(block, encoding="utf-8")
            run("python block.py", tmp_path, search_path)
        elif lines := [line for line in block.splitlines(keepends=True) if not NOT_HERE.match(line)]:
            assert run("".join(lines), tmp_path, search_path), f"prints nothing:\n{block}"
    if page == "docs/formats.md":
        check_keys(tmp_path)


def check_keys(folder: Path) -> None:
    """A heading of docs/formats.md that is a JSON file's name is followed by a table of exactly its keys."""
    tables = re.findall(r"^### (\S+\.json)\n(.*?)(?=^#|\Z)", TEXT["docs/formats.md"], re.DOTALL | re.MULTILINE)
    assert len(tables) >= 6
    columns = {name: "".join(re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)) for name, text in tables}
    documented = {name: sorted(re.findall(r"`(\w+)`", column)) for name, column in columns.items()}
    assert documented == {name: sorted(json.loads((folder / name).read_bytes())) for name in documented}


def check_console(block: str, folder: Path, search_path: str) -> None:
    """Run the commands of a console block and look for its lines in what they print."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        printed = iter(map(without_numbers, run(f"{{ {command}\n}} 2>&1", folder, search_path).splitlines()))
        for line in filter(None, map(without_numbers, shown.splitlines())):
            assert line == "..." or line in printed, f"{command}\ndoes not print, or not in this order:\n{line}"


def without_numbers(line: str) -> str:
    """A line of output whose numbers, bars and columns are all alike."""
    line = re.sub(r"\d[\d,.]*(?:e[+-]?\d+)?", "#", line)
    return " ".join(re.sub(r"█+", "█", line).split())


def run(script: str, folder: Path, search_path: str) -> str:
    """Run a script by bash; return what it wrote on stdout."""
    done = subprocess.run(
        ["bash", "-c", STRICT + script],
        cwd=folder,
        env={**os.environ, "PATH": search_path, "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 141), f"{script}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr, f"{script}\n{done.stderr}"
    return done.stdout


def test_a_wrong_page_would_be_found(demo: Path, search_path: str) -> None:
    with pytest.raises(AssertionError, match="no such file"):
        run("fisherkit inspect nothing.pt | cat\necho still here", demo, search_path)
    check_console("$ echo 3 of 4\n1 of 2\n", demo, search_path)
    with pytest.raises(AssertionError, match="does not print"):
        check_console("$ printf 'a\\nb\\n'\nb\na\n", demo, search_path)


# What is not run above


def test_commands_that_do_not_run_here_call_what_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    lines = [
        line for blocks in BLOCKS.values() for kind, block in blocks for line in block.splitlines() if kind == "sh"
    ]
    not_run = [line.split("#")[0].split() for line in lines if NOT_HERE.match(line)]
    assert not_run
    for words in not_run:
        if words[0] == "make":
            assert set(words[1:]) <= targets, words


def test_commands_are_not_hidden_in_blocks_that_do_not_run() -> None:
    for page, text in TEXT.items():
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            if kind not in ("sh", "console"):
                for line in block.splitlines():
                    is_command = re.match(r"(\$ )?fisherkit \w+ ", line) and not re.search(r"\b[A-Z]{2,}\b", line)
                    assert not is_command, f"{page}: {line}"


def test_every_option_exists() -> None:
    """On a line that begins with a command it is that command's, elsewhere that of any."""
    own = {name: {option for p in command.params for option in p.opts} for name, command in COMMANDS.items()}
    every = set.union(*own.values(), {"--help", "--version", "--install-completion", "--show-completion"})
    for page, text in TEXT.items():
        for span in re.findall(r"`([^`\n]+)`", text):
            words = span.split()
            known = own.get(words[1], every) if words[0] == "fisherkit" and len(words) > 1 else every
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span):
                assert option in known | {"--help"}, f"{page}: `{span}` names {option}"


def test_readme_lists_every_command_with_a_link() -> None:
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(([^)]+)\) \|", TEXT["README.md"], flags=re.MULTILINE))
    assert rows.keys() == COMMANDS.keys()


def test_readme_is_a_front_door() -> None:
    assert len(TEXT["README.md"].splitlines()) <= 125


def test_the_demo_takes_the_same_time_everywhere() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    said = [re.findall(r"about (\w+)\s+minutes", text) for text in (TEXT["README.md"], makefile, COMMANDS["demo"].help)]
    assert said == [said[0]] * 3
    assert len(said[0]) == 1


# Links and trees


def anchors(text: str) -> set[str]:
    """What a link into a page may name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page, text in TEXT.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
            path = (PAGES[page].parent / target).resolve() if target else PAGES[page]
            assert path.exists(), f"{page}: {target}"
            assert path == ROOT or ROOT in path.parents, f"{page}: {target} leaves the repository"
            if anchor:
                assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}#{anchor}"


def test_every_page_is_linked_from_readme() -> None:
    assert {name for name in PAGES if name != "README.md"} <= set(re.findall(r"\]\(([^)#]+)", TEXT["README.md"]))


def test_the_tree_in_contributing_is_that_of_the_folders() -> None:
    (tree,) = re.findall(r"^```text\nfisherkit/\n(.*?)^```", TEXT["docs/contributing.md"], re.DOTALL | re.MULTILINE)
    named, parents = set(), [Path("fisherkit")]
    for line in tree.splitlines():
        indent, entry = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        parents = parents[: len(indent) // 2]
        named.add((parents[-1] / entry).as_posix())
        parents.append(parents[-1] / entry)
    package = ROOT / "fisherkit"
    folders = [path.parent for path in package.rglob("__init__.py") if path.parent != package]
    assert named == {path.relative_to(ROOT).as_posix() for path in [*folders, *package.glob("*.py")]}


# Help and docstrings


def test_help_points_to_nothing_that_is_not_installed() -> None:
    """A person may have the package alone, without this repository."""
    texts = [app.info.help, *(command.help for command in COMMANDS.values())]
    texts += [getattr(p, "help", None) for command in COMMANDS.values() for p in command.params]
    for text in filter(None, texts):
        assert not re.search(r"README|\bdocs?/|\.md\b|DESIGN|\bkernels\.|\bmethods\.|\bengine\.", text), text


def test_every_example_in_help_names_options_that_exist() -> None:
    for name, command in COMMANDS.items():
        (example,) = re.findall(r"Example: fisherkit (\w+)(.*)", command.help or "")
        assert example[0] == name
        assert set(re.findall(r"--[a-z-]+", example[1])) <= {option for p in command.params for option in p.opts}


def test_docstrings_name_modules_that_exist() -> None:
    """``kernels.pull`` and the like: a module, or a name in one."""
    floors = "artefacts|checkpoint|engine|kernels|methods|pairs|training"
    for path in (ROOT / "fisherkit").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for text in filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, documented))):
            for name in re.findall(rf"(?<![\w./])(?:fisherkit\.)?((?:{floors})(?:\.[a-z_]+)+)", text):
                assert is_importable(f"fisherkit.{name}"), f"{path.relative_to(ROOT)}: {name}"


def is_importable(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_formats_names_every_format_of_ours() -> None:
    """Every ``fisherkit.NAME/N`` that the code writes has its place in docs/formats.md."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "fisherkit").rglob("*.py"))
    ours = set(re.findall(r'"(fisherkit\.\w+/\d+)"', source)) | {"fisherkit.fapm/1", "fisherkit.merge/1"}
    assert len(ours) >= 6
    for name in ours:
        assert f"`{name}`" in TEXT["docs/formats.md"], name
