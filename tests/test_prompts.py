"""Prompt sets: rows in, ids and counted tokens out. Spans are checked against text marked by hand."""

import hashlib
import io
import json
import struct
import sys
import types
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import BOS, CHATML, GEMMA, LLAMA, THINKING, CharTokenizer, tiny_tokenizer

from fisherkit.errors import MissingLibraryError, OptionError, PromptError
from fisherkit.options import PromptOptions
from fisherkit.prompts.dataset import PromptReport, PromptSet, Sample, batches, load_prompts

QA = {"prompt": "What is two plus two?", "completion": "Four."}
DIALOGUE = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Are you a bot?"},
    {"role": "assistant", "content": "No."},
]


def load(tmp_path: Path, rows: list[Any], tokenizer: Any = None, **options: Any) -> PromptSet:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_prompts(str(path), tokenizer or tiny_tokenizer(), PromptOptions(**options))


def load_text(tmp_path: Path, name: str, content: str | bytes, tokenizer: Any = None, **options: Any) -> PromptSet:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_prompts(str(path), tokenizer or tiny_tokenizer(), PromptOptions(**options))


def texts(found: PromptSet, tokenizer: Any = None) -> list[str]:
    tokenizer = tokenizer or tiny_tokenizer()
    return [tokenizer.decode(sample.ids).removeprefix(BOS) for sample in found.samples]


def marked(tokenizer: Any, sample: Sample) -> str:
    """The sample's text with counted stretches in braces."""
    pieces, open_ = "", False
    for token, counted in zip(sample.ids, sample.counts, strict=True):
        pieces += ("{" if counted and not open_ else "}" if open_ and not counted else "") + tokenizer.decode([token])
        open_ = counted
    return pieces + "}" * open_


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
    row = {"prompt": "a", "completion": "b", "other": "c", "talk": DIALOGUE}
    assert texts(load(tmp_path, [row], field="other")) == ["c"]
    assert load(tmp_path, [row], field="prompt").report.loss == "all"
    talk = load(tmp_path, [row], field="talk")
    assert (talk.report.kind, talk.report.loss) == ("messages", "completion")


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
        ([["a"]], {}, r'line 1: is \["a"\], not an object with fields'),
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
    with pytest.raises(PromptError, match="is a folder"):
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


# Chat template


@pytest.mark.parametrize("template", [LLAMA, GEMMA])
def test_there_is_one_bos_whoever_adds_it(tmp_path: Path, template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    rows = [{"prompt": "hello"}, {"prompt": f"{BOS}hello"}]
    for chat in ("on", "off"):
        for sample in load(tmp_path, rows, tokenizer, chat_template=chat).samples:
            leading = [token == tokenizer.bos_token_id for token in sample.ids[:2]]
            assert leading == [True, False]
            assert len(sample.counts) == len(sample.ids)
    doubled = tiny_tokenizer(template.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"))
    assert load(tmp_path, [QA], doubled).samples == load(tmp_path, [QA], tokenizer).samples


def test_raw_text_keeps_the_tokenizers_own_special_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    found = load(tmp_path, [{"text": "hello world"}], tokenizer)
    assert found.samples[0].ids == tuple(tokenizer("hello world").input_ids)
    assert found.samples[0].ids[0] == tokenizer.bos_token_id
    assert not found.report.chat_template


def test_prompts_get_the_generation_prompt_and_answers_do_not(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    question = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert texts(load(tmp_path, [{"prompt": "hello"}], tokenizer), tokenizer) == [question]
    assert texts(load(tmp_path, [{"messages": DIALOGUE[:1]}], tokenizer), tokenizer) == [question]
    answered = load(tmp_path, [{"messages": DIALOGUE[:2]}], tokenizer)
    assert texts(answered, tokenizer) == [question + "Yes.<|im_end|>\n"]


def test_on_makes_text_a_user_turn_and_off_makes_prompts_plain(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    on = load(tmp_path, [{"text": "hello"}], tokenizer, chat_template="on")
    assert texts(on, tokenizer) == ["<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"]
    assert texts(load(tmp_path, [{"prompt": "hello"}], tokenizer, chat_template="off"), tokenizer) == ["hello"]


def test_on_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="--chat-template on, but the tokenizer has no chat template"):
        load(tmp_path, [QA], chat_template="on")


def test_template_kwargs_reach_the_template_and_reserved_ones_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(THINKING)
    found = load(tmp_path, [{"prompt": "hello"}], tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert texts(found, tokenizer)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert found.report.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(OptionError, match="--chat-template-kwargs must not set 'tokenize'"):
        load(tmp_path, [QA], tokenizer, chat_template_kwargs={"tokenize": True})


def test_a_refused_system_turn_is_folded_into_the_first_user_turn(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(GEMMA)
    system = {"role": "system", "content": "good"}
    rows = [{"messages": [system, *DIALOGUE[:2]]}, {"messages": DIALOGUE[:2]}]
    found = load(tmp_path, rows, tokenizer)
    assert found.report.folded_system == 1
    assert "1 system turn folded in" in found.report.line()
    assert texts(found, tokenizer)[0] == "<|head|>user\ngood\n\nhello<|tail|>\n<|head|>model\nYes.<|tail|>\n"
    assert load(tmp_path, rows, tiny_tokenizer(CHATML)).report.folded_system == 0


def test_what_the_template_refuses_is_named_by_row(tmp_path: Path) -> None:
    twice = [*DIALOGUE[:1], *DIALOGUE[:1]]
    with pytest.raises(PromptError, match=r"row 2: the chat template refuses it: Roles must alternate"):
        load(tmp_path, [{"messages": DIALOGUE}, {"messages": twice}], tiny_tokenizer(GEMMA))
    with pytest.raises(PromptError, match=r"row 1: the chat template refuses it: System role not supported"):
        load(tmp_path, [{"messages": [{"role": "system", "content": "a"}, *twice]}], tiny_tokenizer(GEMMA))
    with pytest.raises(PromptError, match=r"row 1: the chat template refuses it: 'dict object' has no"):
        load(tmp_path, [QA], tiny_tokenizer("{{ messages[0].nothing.more }}"))


# Which tokens count


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n[{1}<|im_end|>]\n"),
        (LLAMA, "<s><|head|>user<|tail|>\n\n{0}<|eot|><|head|>assistant<|tail|>\n\n[{1}<|eot|>]"),
        (GEMMA, "<s><|head|>user\n{0}<|tail|>\n<|head|>model\n[{1}<|tail|>]\n"),
        (THINKING, "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\n{1}<|im_end|>]\n"),
        (None, "<s>{0}[{1}]"),
    ],
)
def test_completion_counts_the_answer_and_its_end_mark(tmp_path: Path, template: str | None, expected: str) -> None:
    tokenizer = tiny_tokenizer(template)
    found = load(tmp_path, [QA], tokenizer)
    by_hand = expected.format(QA["prompt"], QA["completion"]).replace("[", "{").replace("]", "}")
    assert marked(tokenizer, found.samples[0]) == by_hand
    assert found.report.realigned == 0


def test_an_empty_thought_in_the_generation_prompt_does_not_count(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(THINKING)
    found = load(tmp_path, [QA], tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert marked(tokenizer, found.samples[0]).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n{Four.<|im_end|>}\n"
    )


def test_a_start_is_realigned_where_only_the_generation_prompt_differs(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(THINKING)
    options: dict[str, Any] = {"loss": "assistant", "chat_template_kwargs": {"enable_thinking": False}}
    found = load(tmp_path, [{"messages": DIALOGUE}], tokenizer, **options)
    assert "assistant\n{Yes.<|im_end|>}\n<|im_start|>user" in marked(tokenizer, found.samples[0])
    assert found.report.realigned == 1


def test_an_answer_that_begins_like_the_generation_prompt_ends_is_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(THINKING)
    talk = [dict(turn) for turn in DIALOGUE]
    talk[1]["content"] = "<b>"
    options: dict[str, Any] = {"loss": "assistant", "chat_template_kwargs": {"enable_thinking": False}}
    found = load(tmp_path, [{"messages": talk}], tokenizer, **options)
    assert "assistant\n{<b><|im_end|>}\n" in marked(tokenizer, found.samples[0])


def test_blanks_that_end_a_turn_count_where_there_is_no_other_mark(tmp_path: Path) -> None:
    turns = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(turns + "{% if add_generation_prompt %}assistant:{% endif %}")
    found = load(tmp_path, [{"messages": DIALOGUE}], tokenizer, loss="assistant")
    assert marked(tokenizer, found.samples[0]) == "user:hello\nassistant:{Yes.\n}user:Are you a bot?\nassistant:{No.\n}"


def test_completion_counts_the_last_answer_and_assistant_all(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{}\n<|im_start|>user\nAre you a bot?<|im_end|>\n"
    last = "<|im_start|>assistant\n{No.<|im_end|>}\n"
    row = {"messages": DIALOGUE}
    completion = load(tmp_path, [row], tokenizer).samples[0]
    assert marked(tokenizer, completion) == text.replace("{}", "Yes.<|im_end|>") + last
    assistant = load(tmp_path, [row], tokenizer, loss="assistant").samples[0]
    assert marked(tokenizer, assistant) == text.replace("{}", "{Yes.<|im_end|>}") + last
    assert completion.ids == assistant.ids


def test_all_counts_every_token_but_the_first(tmp_path: Path) -> None:
    for template in (CHATML, LLAMA, None):
        for sample in load(tmp_path, [QA, {**QA, "prompt": "hello"}], tiny_tokenizer(template), loss="all").samples:
            assert sample.counts == (False,) + (True,) * (len(sample.ids) - 1)
            assert sample.loss_tokens == len(sample.ids) - 1


def test_spans_survive_templates_that_drop_earlier_thoughts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(THINKING)
    talk = [dict(turn) for turn in DIALOGUE]
    talk[1]["content"] = "<think>\nhm\n</think>\n\nYes."
    found = load(tmp_path, [{"messages": talk}], tokenizer, loss="assistant")
    assert marked(tokenizer, found.samples[0]) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{Yes.<|im_end|>}\n"
        "<|im_start|>user\nAre you a bot?<|im_end|>\n<|im_start|>assistant\n{<think>\n\n</think>\n\nNo.<|im_end|>}\n"
    )
    assert found.report.realigned == 1
    assert found.report.line().endswith(", 1 realigned")


def test_spans_survive_an_answer_that_closes_with_another_mark_when_last(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{{ '<|tail|>' if loop.last and m.role == 'assistant' else '<|eot|>' }}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt }}"
    )
    tokenizer = tiny_tokenizer(template)
    found = load(tmp_path, [{"messages": DIALOGUE}], tokenizer, loss="assistant")
    assert marked(tokenizer, found.samples[0]) == (
        "user:hello<|eot|>assistant:{Yes.<|eot|>}user:Are you a bot?<|eot|>assistant:{No.<|tail|>}"
    )
    assert found.report.realigned == 1


def test_rows_whose_answer_cannot_be_found_are_skipped_and_counted(tmp_path: Path) -> None:
    backwards = "{% for m in messages | reverse %}{{ m.role }}:{{ m.content }}<|eot|>{% endfor %}"
    with pytest.raises(PromptError, match=r"no sample left of 1 row \(1 answer not found in the rendered template\)"):
        load(tmp_path, [QA], tiny_tokenizer(backwards))
    assert load(tmp_path, [QA], tiny_tokenizer(backwards), loss="all").report.samples == 1
    deaf = "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ 'x' if loop.last }}{% endfor %}"
    with pytest.raises(PromptError, match="1 answer not found"):
        load(tmp_path, [QA], tiny_tokenizer(deaf))
    no_prefix = "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}{{ messages[1].content }}"
    with pytest.raises(PromptError, match="1 answer not found"):
        load(tmp_path, [QA], tiny_tokenizer(no_prefix))


@pytest.mark.parametrize("template", [LLAMA, None])
def test_tokenizers_without_offsets_count_the_same_characters(tmp_path: Path, template: str | None) -> None:
    tokenizer = CharTokenizer(chat_template=template)
    sample = load(tmp_path, [QA], tokenizer).samples[0]
    counted = [token - 2 for token, counts in zip(sample.ids, sample.counts, strict=True) if counts]
    assert "".join(map(chr, counted)) == ("Four.<|eot|>" if template else "Four.")


def test_a_token_across_the_seam_counts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer("What").input_ids) == 2  # BOS and one token
    sample = load(tmp_path, [{"prompt": "Wh", "completion": "at"}], tokenizer).samples[0]
    assert sample.counts == (False, True)


def test_a_set_without_answers_refuses_losses_on_answers(tmp_path: Path) -> None:
    for loss in ("completion", "assistant"):
        with pytest.raises(
            PromptError, match=rf"no loss token anywhere: --loss {loss} .* prompts only .*use --loss all"
        ):
            load(tmp_path, [{"prompt": "hello"}], loss=loss)


# Skipping, cutting, counting


def test_blank_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": ""}, {"prompt": "hello"}, {"prompt": " \n"}, {"prompt": "one two"}, {"prompt": []}]
    found = load(tmp_path, rows)
    assert [sample.row for sample in found.samples] == [1, 3]
    assert (found.report.rows, found.report.samples, found.report.skipped) == (5, 2, 3)
    assert (found.report.skipped_because, found.report.rows_used) == ({"empty": 3}, "1,3")
    answers = load(tmp_path, [{**QA, "completion": ""}, QA])
    assert (answers.report.loss, answers.report.skipped) == ("completion", 1)


def test_a_blank_system_turn_is_harmless(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": ""}, *DIALOGUE]}]
    assert load(tmp_path, rows, tiny_tokenizer(CHATML)).report.skipped == 0
    folded = load(tmp_path, rows, tiny_tokenizer(GEMMA))
    assert folded.samples == load(tmp_path, [{"messages": DIALOGUE}], tiny_tokenizer(GEMMA)).samples


def test_a_prompt_of_one_token_has_no_loss(tmp_path: Path) -> None:
    bare = tiny_tokenizer(adds_bos=False)
    found = load(tmp_path, [{"prompt": "?"}, {"prompt": "one two"}], bare)
    assert found.report.skipped_because == {"without a loss token": 1}
    with pytest.raises(PromptError, match=r"no sample left of 2 rows \(1 without a loss token, 1 empty\)"):
        load(tmp_path, [{"prompt": "?"}, {"prompt": ""}], bare)


def test_cutting_is_on_the_right_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "hello"}, {"prompt": "good morning to you all, good morning"}]
    whole = load(tmp_path, rows).samples
    longest = len(whole[0].ids)
    cut = load(tmp_path, rows, max_length=longest)
    assert cut.report.truncated == 1
    assert [sample.ids for sample in cut.samples] == [whole[0].ids, whole[1].ids[:longest]]
    exact = load(tmp_path, rows, max_length=len(whole[1].ids))
    assert (exact.report.truncated, exact.samples) == (0, whole)


def test_answers_beyond_the_cut_are_skipped_and_all_of_them_is_an_error(tmp_path: Path) -> None:
    rows = [QA, {"prompt": "a", "completion": "b"}]
    short = len(load(tmp_path, rows[1:]).samples[0].ids)
    found = load(tmp_path, rows, max_length=short)
    assert found.report.skipped_because == {"cut off before the first loss token": 1}
    assert (found.report.truncated, found.report.rows_used) == (0, "1")
    message = (
        r"no sample left of 2 rows \(2 cut off before .*\); raise --max-length \(now 2\) or use --loss all \(now comp"
    )
    with pytest.raises(PromptError, match=message):
        load(tmp_path, [QA, QA], max_length=2)


def test_the_report_adds_up(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"prompt": ""}, *[{"prompt": f"What is {n}?"} for n in range(4)]]
    found = load(tmp_path, rows, max_length=5)
    report: PromptReport = found.report
    assert report.tokens == sum(len(sample.ids) for sample in found.samples)
    assert report.loss_tokens == sum(sum(sample.counts) for sample in found.samples)
    assert (report.rows_used, report.max_length, report.template_sha256) == ("0,2-5", 5, None)
    assert report.line() == (
        f"6 prompts, field prompt, chat template off, {report.truncated} truncated, 1 skipped, "
        f"{report.loss_tokens} loss tokens"
    )


def test_the_hash_is_over_ids_and_counts(tmp_path: Path) -> None:
    found = load(tmp_path, [QA, {**QA, "prompt": "hello"}])
    expected = b"".join(
        struct.pack("<I", len(sample.ids)) + b"".join(struct.pack("<I", token) for token in sample.ids)
        + b"".join(b"\1" if counts else b"\0" for counts in sample.counts)
        for sample in found.samples
    )  # fmt: skip
    assert found.report.sha256 == hashlib.sha256(expected).hexdigest()
    assert load(tmp_path, [QA], loss="all").report.sha256 != load(tmp_path, [QA]).report.sha256
    templated = load(tmp_path, [QA], tiny_tokenizer(CHATML)).report
    assert templated.template_sha256 == hashlib.sha256(CHATML.encode()).hexdigest()


# Batches


def test_batches_hold_every_sample_once_within_the_budget() -> None:
    samples = [Sample(i, (0,) * n, (True,) * n) for i, n in enumerate((i * i * 7) % 39 + 1 for i in range(60))]
    for budget in (1, 7, 64, 10_000):
        packed = batches(samples, budget)
        assert sorted(i for batch in packed for i in batch) == list(range(60))
        for batch in packed:
            assert len(batch) == 1 or len(batch) * max(len(samples[i].ids) for i in batch) <= budget
        order = [(len(samples[i].ids), i) for batch in packed for i in batch]
        assert order == sorted(order)
        assert packed == batches(samples, budget)
        for batch, following in pairwise(packed):  # no batch has room for the next sample
            assert (len(batch) + 1) * len(samples[following[0]].ids) > budget
    assert batches([], 64) == ()


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
