"""Prompt sets: what a row means, wherever it comes from, whatever it is called."""

import io
import sys
import types
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from prompt_sets import DIALOGUE, QA, load, load_text, texts
from tiny_tokenizers import CHATML, tiny_tokenizer

from fisherkit.errors import MissingLibraryError, PromptError
from fisherkit.options import PromptOptions
from fisherkit.prompts.dataset import load_prompts

# Fields

SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
ALPACA = {"instruction": "a", "input": "c", "output": "b", "text": "x"}
LAYOUTS = [  # row, kind, fields, text without a template, loss
    ({"prompt": "a b"}, "prompt", "prompt", "a b", "all"),
    ({"text": "a b"}, "text", "text", "a b", "all"),
    ({"prompt": "a b", "text": "x"}, "prompt", "prompt", "a b", "all"),
    ({"prompt": DIALOGUE[:1]}, "prompt", "prompt", "hello", "all"),
    ({"prompt": "a ", "completion": "b"}, "prompt+completion", "prompt+completion", "a b", "completion"),
    (
        {"prompt": DIALOGUE[:1], "completion": DIALOGUE[1:2]},
        *("prompt+completion", "prompt+completion", "hello\n\nYes.", "completion"),
    ),
    (ALPACA, "instruction+output", "instruction+input+output", "a\n\nc\n\nb", "completion"),
    ({**ALPACA, "input": ""}, "instruction+output", "instruction+input+output", "a\n\nb", "completion"),
    ({"instruction": "a", "output": "b"}, "instruction+output", "instruction+output", "a\n\nb", "completion"),
    ({"instruction": "a"}, "instruction", "instruction", "a", "all"),
    ({"question": "a", "answer": "b"}, "question+answer", "question+answer", "a\n\nb", "completion"),
    ({"messages": DIALOGUE[:1]}, "messages", "messages", "hello", "all"),
    ({"prompt": "x", "messages": DIALOGUE[:2]}, "messages", "messages", "hello\n\nYes.", "completion"),
    ({"messages": SHAREGPT}, "messages", "messages", "a\n\nb", "completion"),
    ({"conversations": SHAREGPT}, "conversations", "conversations", "a\n\nb", "completion"),
    ({"chosen": "a", "rejected": "b"}, "chosen", "chosen", "a", "all"),
    ({"chosen": DIALOGUE[:2], "rejected": []}, "chosen", "chosen", "hello\n\nYes.", "completion"),
    ({"prompt": "hello", "chosen": DIALOGUE[:2]}, "prompt+chosen", "prompt+chosen", "hello\n\nYes.", "completion"),
    ({"prompt": "a", "chosen": "b"}, "prompt+chosen", "prompt+chosen", "ab", "completion"),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case[1])
def test_fields_are_detected_from_the_first_row(
    tmp_path: Path, case: tuple[dict[str, Any], str, str, str, str]
) -> None:
    row, kind, field, plain, loss = case
    found = load(tmp_path, [row])
    assert (found.report.kind, found.report.field, found.report.loss) == (kind, field, loss)
    assert texts(found) == [plain]


def test_roles_of_sharegpt_reach_the_template_under_their_usual_names(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "system", "value": "s"}, *SHAREGPT, {"from": "tool", "value": "t"}]}]
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    assert texts(load(tmp_path, rows, tokenizer)) == ["system:s;user:a;assistant:b;tool:t;"]


def test_field_overrides_detection(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "other": "c", "conversation": DIALOGUE}
    assert texts(load(tmp_path, [row], field="other")) == ["c"]
    assert load(tmp_path, [row], field="prompt").report.loss == "all"
    conversation = load(tmp_path, [row], field="conversation")
    assert (conversation.report.kind, conversation.report.loss) == ("messages", "completion")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([QA, {"prompt": "a", "b": 1}], {}, r"set\.jsonl row 2: no field 'completion' \(it has: prompt, b\)$"),
        ([{"a": "x", "b": "y"}], {}, r"row 1: none of its fields is known \(it has: a, b\); name the one .* --field"),
        ([{}], {}, r"row 1: none of its fields is known \(it has: nothing\)"),
        ([{"a": "x"}], {"field": "b"}, r"row 1: no field 'b' \(it has: a\)$"),
        ([{"prompt": 3}], {}, r"row 1: field 'prompt' is a number, not text"),
        ([{"prompt": "a"}, {"prompt": None}], {}, r"row 2: field 'prompt' is null, not text"),
        ([{"prompt": {"a": 1}}], {}, r"row 1: field 'prompt' is a dict, not text"),
        ([{"messages": "a"}], {}, r"row 1: field 'messages' is text, not a list of messages"),
        ([{"messages": ["a"]}], {}, r"field 'messages', message 1 is text, not an object with role and content"),
        ([{"messages": [{"content": "a"}]}], {}, r"message 1 has no role \(it has: content\)"),
        ([{"messages": [{"role": ["a"], "content": "a"}]}], {}, r"message 1 has no role"),
        ([{"messages": [{"role": "user", "content": 1}]}], {}, r"message 1: its content is a number, not text"),
        ([["a"]], {}, r"line 1: is a list, not an object with fields"),
        ([{"prompt": "a \ud83d b"}], {}, r"row 1: holds '\\ud83d', half of a surrogate pair"),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        load(tmp_path, rows, **options)
    assert "\n" not in str(caught.value)


def test_keys_that_column_stores_fill_with_null_are_dropped(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.tool_calls is defined %}CALL{% endif %}{{ m.content }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "one two", "tool_calls": None}]}]
    assert texts(load(tmp_path, rows, tiny_tokenizer(template))) == ["one two"]


# Sources

SAME_TWO = {
    "a.txt": "one two\n\n  \nthree\n",
    "b.txt": "one two\r\nthree",
    "bom.txt": "\ufeffone two\nthree\n",
    "none": "one two\nthree\n",
    "a.jsonl": '{"prompt": "one two"}\n\n{"prompt": "three"}\n',
    "a.ndjson": '{"prompt": "one two"}\n{"prompt": "three"}',
    "sniffed": '\n{"prompt": "one two"}\n{"prompt": "three"}\n',
    "a.json": '[{"prompt": "one two"}, {"prompt": "three"}]',
    "wrapped.json": '{"version": 1, "data": [{"prompt": "one two"}, {"prompt": "three"}]}',
    "strings.json": '["one two", "three"]',
    "lines.json": '{"prompt": "one two"}\n{"prompt": "three"}\n',
    "a.csv": 'id,prompt\n1,one two\n\n2,"three"\n',
    "A.TSV": "id\tprompt\n1\tone two\n2\tthree\n",
}


@pytest.mark.parametrize("name", SAME_TWO)
def test_every_format_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    found = load_text(tmp_path, name, SAME_TWO[name])
    assert texts(found) == ["one two", "three"]
    assert [sample.row for sample in found.samples] == [0, 1]


@pytest.mark.parametrize("content", ["one two\nthree\n", '{"prompt": "one two"}\n{"prompt": "three"}\n'])
def test_stdin_is_sniffed(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert texts(load_prompts("-", tiny_tokenizer(), PromptOptions())) == ["one two", "three"]


def test_braces_alone_do_not_make_a_line_json(tmp_path: Path) -> None:
    assert texts(load_text(tmp_path, "none", "{name} says\n{1}\n")) == ["{name} says", "{1}"]


def test_quoted_cells_keep_separators_quotes_and_line_breaks(tmp_path: Path) -> None:
    assert texts(load_text(tmp_path, "a.csv", 'prompt\n"a, ""b""\nc"\n')) == ['a, "b"\nc']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt: no prompts in it$"),
        ("a.txt", "\n \n", "no prompts in it"),
        ("a.jsonl", "", "no prompts in it"),
        ("a.json", "[]", "no prompts in it"),
        ("a.json", " ", "no prompts in it"),
        ("a.csv", "", "no prompts in it"),
        ("a.csv", "prompt\n", "no prompts in it"),
        ("a.txt", b"good\ncaf\xe9\n", r"a\.txt line 2: not UTF-8 \(byte 0xe9 at position 4\); save the file as UTF-8"),
        ("a.txt", "hello".encode("utf-16"), r"a\.txt line 1: has a NUL byte"),
        ("a.csv", b"prompt\na\0b\n", r"a\.csv line 2: has a NUL byte"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl line 2: not valid JSON: .* \(column \d+\)"),
        ("a.json", '[{"prompt": "a"},\n nope]', r"a\.json line 2: not valid JSON: .* \(column 2\)"),
        ("a.json", '{"prompt": "a"}', r"holds neither a list of rows nor \{\"data\": \[\.\.\.\]\}"),
        ("a.json", "[1]", r"a\.json row 1: is 1, not an object"),
        ("a.jsonl", "[" * 100_000, r"line 1: not usable JSON"),
        ("a.jsonl", '{"prompt": ' + "1" * 5000 + "}", r"line 1: not usable JSON"),
        ("a.csv", "id,prompt\n1,Name, in order, three\n", r"line 2: 4 cells under a header of 2; .* double quotes"),
        ("a.csv", 'prompt\n"never closed\n', r"a\.csv line 2: not valid CSV"),
        ("a.pdf", "x", r"a\.pdf: \.pdf is not a prompt file; known are \.txt, .*\.tsv and \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        load_text(tmp_path, name, content)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for missing in ("typo.txt", "./folder/name", "/no/such", "a/b/c"):
        with pytest.raises(PromptError, match="no such file"):
            load_prompts(missing, tiny_tokenizer(), PromptOptions())
    with pytest.raises(PromptError, match="a folder without a prompt file"):
        load_prompts(tmp_path, tiny_tokenizer(), PromptOptions())


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    found = load_text(tmp_path, "a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\nnot json', limit=2)
    assert texts(found) == ["one", "two"]
    assert load_text(tmp_path, "a.txt", "x y\n" * 300, limit=None).report.rows == 300


# Data sets


def fake_datasets(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[Any]], calls: list[Any]) -> None:
    def load_dataset(name: str, *, split: str | None, revision: str | None, streaming: bool) -> Any:
        calls.append((name, split, revision, streaming))
        return splits[split] if split else splits

    config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, config=config))


@pytest.mark.parametrize(
    ("source", "call", "text"),
    [
        ("org/name", ("org/name", None, None, True), "train row"),
        ("org/name:test", ("org/name", "test", None, True), "test row"),
        ("org/name:test@v1.0", ("org/name", "test", "v1.0", True), "test row"),
        ("name@abc", ("name", None, "abc", True), "train row"),
    ],
)
def test_hub_names_carry_split_and_revision(
    monkeypatch: pytest.MonkeyPatch, source: str, call: tuple[Any, ...], text: str
) -> None:
    calls: list[Any] = []
    fake_datasets(monkeypatch, {"train": [{"prompt": "train row"}], "test": [{"prompt": "test row"}]}, calls)
    assert texts(load_prompts(source, tiny_tokenizer(), PromptOptions())) == [text]
    assert calls == [call]


def test_without_a_train_split_the_choice_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, {"a": [{"prompt": "x y"}], "b": []}, [])
    with pytest.raises(PromptError, match=r"org/name: has the splits a, b; name one as org/name:a"):
        load_prompts("org/name", tiny_tokenizer(), PromptOptions())
    fake_datasets(monkeypatch, {"only": [{"prompt": "x y"}]}, [])
    assert texts(load_prompts("org/name", tiny_tokenizer(), PromptOptions())) == ["x y"]


def test_what_datasets_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, {}, [])
    with pytest.raises(
        PromptError, match="org/name:test: no file here, so a data set of the hub that cannot be read: 'test'"
    ):
        load_prompts("org/name:test", tiny_tokenizer(), PromptOptions())


def test_without_datasets_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingLibraryError, match=r"org/name: no file here, so a data set of the hub, which needs the library"
    ):
        load_prompts("org/name", tiny_tokenizer(), PromptOptions())
    with pytest.raises(MissingLibraryError, match=r"parquet: a parquet file, which needs the library 'datasets'"):
        load_text(tmp_path, "a.parquet", b"PAR1")


# The set that ships


def test_the_builtin_set_has_200_different_instructions() -> None:
    lines = files("fisherkit.prompts").joinpath("builtin_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200
    assert all(10 <= len(line.split()) <= 80 and line == line.strip() for line in lines)
    for words in (3, -3):  # no two start or end alike, hence no two from one mould
        ends = [tuple(line.lower().split()[:words] if words > 0 else line.lower().split()[words:]) for line in lines]
        assert len(set(ends)) == 200
    report = load_prompts("builtin", tiny_tokenizer(CHATML), PromptOptions(max_length=1000)).report
    assert (report.rows, report.samples, report.skipped, report.loss) == (200, 200, 0, "all")
    assert report.line().startswith("200 prompts, field prompt, chat template on, 0 truncated, 0 skipped, ")


def test_parquet_is_read_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = sys.modules["pyarrow"].table({"messages": [DIALOGUE, DIALOGUE[:2]], "other": [1, 2]})
    parquet.write_table(table, tmp_path / "a [1]*.parquet")
    found = load_prompts(tmp_path / "a [1]*.parquet", tiny_tokenizer(CHATML), PromptOptions())
    assert (
        found.samples
        == load(tmp_path, [{"messages": DIALOGUE}, {"messages": DIALOGUE[:2]}], tiny_tokenizer(CHATML)).samples
    )
    with pytest.raises(PromptError, match=r"bad\.parquet: a parquet file that cannot be read"):
        load_text(tmp_path, "bad.parquet", b"PAR1 not really")
