"""Damaged files of every format that a command reads: the right answer, or one clear line; nothing in between.

A command ends with 0 and an answer that a plain reader confirms, or with 1 or 2 and one line of 300 characters at
most. No code of a file runs, nothing is written but the output, inputs stay as they are, and nothing lies at the
output's name after a failure; within limits of time and memory. ``make fuzz`` tries thousands.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from forked import Ended, run
from fuzz_material import SHARD, TARGETS, Target, copy_material, make_material
from hypothesis import HealthCheck, Phase, example, given, note, seed, settings
from hypothesis import strategies as st
from mutations import Change, changes_for
from safetensors import SafetensorError
from safetensors.torch import load_file

EXAMPLES = int(os.environ.get("FISHERKIT_FUZZ", "4"))  # damaged inputs per target
SEED = int(os.environ.get("FISHERKIT_FUZZ_SEED", "0"))
SECONDS = 20.0  # generous: machines are shared; a hang takes minutes
MEMORY_BYTES = 2 << 30
LONGEST = 300 + len("Error: ")

profile = settings(
    max_examples=EXAMPLES,
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_damaged_file_gives_the_right_answer_or_one_line(target: Target, material: Path) -> None:
    @seed(SEED)
    @profile
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(target.files), label="file")
        changes = data.draw(st.lists(changes_for(file), min_size=1, max_size=3), label="changes")
        for command in target.commands:
            note(f"{command}, {file}: {'; '.join(change.text for change in changes)}")
            attempt(command, {file: changes}, material)

    check()


def attempt(command: str, damage: dict[str, list[Change]], material: Path) -> Ended:
    """Run a command on damaged copies of the material in a folder of its own, and check how it ends."""
    place = material.parent / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    copy_material(material, place, set(damage))
    for file, changes in damage.items():
        content = (place / file).read_bytes()
        for change in changes:
            content = change.apply(content)
        (place / file).write_bytes(content)
    before = listing(place)
    done = run(command.split(), place, timeout_seconds=SECONDS, memory_bytes=MEMORY_BYTES)
    check_end(done, place, before)
    if done.code == 0 and command.startswith("inspect "):
        check_answer(done, place, command)
    return done


def listing(place: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def check_end(done: Ended, place: Path, before: dict[str, bytes]) -> None:
    """The form of an end: code, streams, files."""
    summary = f"{' '.join(done.words)}: code {done.code}\n{done.stderr[:2000]}"
    assert not done.late, f"took more than {SECONDS} s: {summary}"
    assert done.code in (0, 1, 2), summary
    assert "Traceback" not in done.stderr, summary
    assert "Warning" not in done.stderr, summary
    after = listing(place)
    assert not [name for name in after if "code-ran" in name], f"code ran: {summary}"
    assert {name: after.get(name) for name in before} == before, f"inputs have changed: {summary}"
    outside = [path for _, path in done.changes if not Path(path).is_relative_to(place)]
    assert not [path for path in outside if not path.startswith("/tmp/")], f"wrote {outside}: {summary}"  # noqa: S108
    if done.code:
        lines = done.stderr.rstrip("\n").splitlines()
        assert lines, summary
        assert lines[-1].startswith("Error: ") or done.code == 2, summary
        assert sum(line.startswith("Error: ") for line in lines) == 1 or done.code == 2, summary
        assert len(lines[-1]) <= LONGEST, summary
        assert not lines[-1].startswith("Error: unexpected "), summary
        assert not done.stdout, summary
        new = [name for name in after if name not in before and ".partial/" not in name]
        assert not new, f"left {new}: {summary}"


def check_answer(done: Ended, place: Path, command: str) -> None:
    """Compare what ``inspect`` prints of a Fisher with what the libraries that made the file read from it."""
    path = place / command.split()[1]
    if path.suffix not in (".safetensors", ".pt") or not path.name.startswith(("fisher", "plain")):
        return
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise AssertionError(
            f"inspect read what {type(error).__name__} says nobody can: {done.stdout[:500]}"
        ) from error
    rows = [line.split("\t") for line in done.stdout.splitlines()[1:]]
    weights = sum(int(row[2]) for row in rows)
    assert weights == sum(tensor.numel() for tensor in held.values()), done.stdout
    total = sum(float(tensor.double().abs().nan_to_num(0, 0, 0).sum()) for tensor in held.values())
    total_of_rows = sum(float(row[3]) for row in rows if row[3] != "null")
    assert total_of_rows == pytest.approx(total, rel=1e-2, abs=1e-30), (total_of_rows, total)


# What was found once, and must not come back: a command, the file that was damaged, and what in it became what.
FOUND = (
    ("fapm base tuned out", "base/config.json", b'"LlamaForCausalLM"', rb'"\ud800"'),
    ("merge base tuned out", "base/config.json", b'"LlamaForCausalLM"', rb'"\ud800"'),
    ("fapm base tuned out", SHARD, b"embed_tokens.weight", rb"embed_tokens\ud800."),
    ("inspect fisher.safetensors", "fisher.safetensors", b'"format":"pt"', b'"format":1000'),
    ("extract base p.jsonl -o out.pt", SHARD, b"embed_tokens.weight", rb"embed_tokens\ud800."),
    *(
        (command, "base/config.json", b'"architectures": [\n    "LlamaForCausalLM"\n  ]', b'"architectures": ' + odd)
        for command in ("fapm base tuned out", "merge base tuned out")
        for odd in (b"-1", b"true", b"{}", b"[1]", b"[]")
    ),
)


@pytest.mark.parametrize(("command", "file", "old", "new"), FOUND)
def test_what_was_found_once_stays_mended(command: str, file: str, old: bytes, new: bytes, material: Path) -> None:
    change = Change(f"{old!r} to {new!r}", lambda content: content.replace(old, new, 1))
    assert old in (material / file).read_bytes()
    attempt(command, {file: [change]}, material)


# Words on the command line

WORDS = ("-1", "0", "1", "2", "1e400", "nan", "inf", "", " ", "99999999999999999999", "0-9999999999", "abc", "../x",
         "\x1b[31m", "(a+)+$", "[", "a" * 3000, "{}", '{"a": NaN}', "[" * 3000, "é" * 400, "--", "-")  # fmt: skip
LINES = (
    "extract base p.jsonl -o out.pt --dry-run --limit {} --max-length {}",
    "extract base p.jsonl -o out.pt --dry-run --layers {}",
    "extract base p.jsonl -o out.pt --dry-run --targets {}",
    "extract base p.jsonl -o out.pt --limit 1 --chat-template-kwargs {}",
    "extract base p.jsonl -o out.pt --limit 1 --group-size {} --batch-tokens {}",
    "extract base p.jsonl -o out.pt --dry-run --field {} --dtype {}",
    "extract {} p.jsonl -o out.pt --dry-run",
    "extract base {} -o out.pt --dry-run",
    "inspect fisher.safetensors --by {} --sort {}",
    "inspect fisher.safetensors --top {} --format {}",
    "combine part-1.safetensors part-2.safetensors -o out.pt --weights {} --store {}",
    "extract base p.jsonl -o out.pt --dry-run --shard {}",
    "mask fisher.safetensors -o out.safetensors --train top --keep {} --scope {}",
    "mask fisher.safetensors -o out.safetensors --svd-rank {}",
    "mask fisher.safetensors -o out.safetensors --svd-energy {} --pull {}",
    "fapm base tuned out --sparsity {} --metric {}",
    "fapm base tuned out --only {} --skip {}",
    "fapm base tuned --sweep {}",
    "fapm base tuned out --max-shard-size {}",
    "merge base tuned out --alpha {}",
    "merge base tuned out --layer-scale layer_importance.json --power {} --floor {}",
    "export mask.safetensors --to {} --learning-rate {}",
)


@pytest.mark.parametrize("line", LINES)
def test_odd_words_give_an_answer_or_one_line(line: str, material: Path) -> None:
    @seed(SEED)
    @profile
    @given(words=st.lists(st.sampled_from(WORDS), min_size=2, max_size=2))
    @example(words=["nan", "-1"])
    @example(words=["[" * 3000, "0"])
    def check(words: list[str]) -> None:
        place = material.parent / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        copy_material(material, place, set())
        before, left = listing(place), iter(words)
        command = [next(left) if word == "{}" else word for word in line.split()]
        done = run(command, place, timeout_seconds=SECONDS, memory_bytes=MEMORY_BYTES)
        if done.code == 2 and re.search(r"^Usage: ", done.stderr, flags=re.MULTILINE):
            return  # typer's own words
        check_end(done, place, before)

    check()
