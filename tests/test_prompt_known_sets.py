"""Prompt sets as they are published: each is read as its question and its answer, or says what is not read."""

from pathlib import Path
from typing import Any

import pytest
from prompt_sets import DIALOGUE, QA, load, load_text, remarks, texts
from tiny_tokenizers import CHATML, tiny_tokenizer

from fisherkit.errors import OptionError, PromptError
from fisherkit.options import PromptOptions, parse_field
from fisherkit.prompts.turns import join_parts

HH = "\n\nHuman: hello\n\nAssistant: Yes.\n\nHuman: Are you a bot?\n\nAssistant: No."
SETS: dict[str, tuple[dict[str, Any], str, str]] = {  # row, its columns that are read, text without a template
    "dolly": (
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        "instruction+context+response",
        "q\n\nc\n\na",
    ),
    "dolly blank": ({"instruction": "q", "context": "", "response": "a"}, "instruction+context+response", "q\n\na"),
    "magicoder": ({"instruction": "q", "response": "a"}, "instruction+response", "q\n\na"),
    "orca": (
        {"id": "1", "system_prompt": "s", "question": "q", "response": "a"},
        "system_prompt+question+response",
        "s\n\nq\n\na",
    ),
    "orca blank": (
        {"system_prompt": "", "question": "q", "response": "a"},
        "system_prompt+question+response",
        "q\n\na",
    ),
    "trace": ({"prompt": "q", "answer": "a"}, "prompt+answer", "q\n\na"),
    "prompt/response": ({"prompt": "q", "response": "a"}, "prompt+response", "q\n\na"),
    "metamath": ({"query": "q", "response": "a", "type": "x"}, "query+response", "q\n\na"),
    "math": ({"problem": "q", "solution": "a 4", "level": "5", "type": "x"}, "problem+solution", "q\n\na 4"),
    "numina": (
        {"problem": "q", "solution": "Yes.", "answer": "Y", "messages": DIALOGUE[:2]},
        *("messages", "hello\n\nYes."),
    ),
    "problem/answer": ({"problem": "q", "answer": "a"}, "problem+answer", "q\n\na"),
    "input/output": ({"input": "q", "output": "a"}, "input+output", "q\n\na"),
    "flan": ({"inputs": "q", "targets": "a", "task": "x"}, "inputs+targets", "q\n\na"),
    "gsm8k": ({"question": "q", "answer": "so\n#### 72"}, "question+answer", "q\n\nso\n#### 72"),
    "numbers": ({"question": "q", "answer": 72}, "question+answer", "q\n\n72"),
    "trivia": ({"question": "q", "answer": ["a", "b"]}, "question+answer", "q\n\na"),
    "context": ({"question": "q", "context": "c", "answer": "a"}, "context+question+answer", "c\n\nq\n\na"),
    "hotpot": (
        {"question": "q", "context": {"title": ["t"]}, "answer": "a"},
        *("question+answer", "q\n\na"),
    ),
    "squad": (
        {"context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}},
        *("context+question+answers", "c\n\nq\n\na"),
    ),
    "mmlu": (
        {"question": "q", "subject": "x", "choices": ["w", "x", "y", "z"], "answer": 2},
        *("question+choices+answer", "q\n\nA. w\nB. x\nC. y\nD. z\n\nC"),
    ),
    "mmlu letter": (
        {"question": "q", "choices": ["w", "x", "y", "z"], "answer": "C"},
        *("question+choices+answer", "q\n\nA. w\nB. x\nC. y\nD. z\n\nC"),
    ),
    "mmlu columns": (
        {"question": "q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"},
        *("question+A+B+C+D+answer", "q\n\nA. w\nB. x\nC. y\nD. z\n\nC"),
    ),
    "arc": (
        {"id": "1", "question": "q", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": "B"},
        *("question+choices+answerKey", "q\n\nA. w\nB. x\n\nx"),
    ),
    "arc numbers": (
        {"question": "q", "choices": {"text": ["w", "x"], "label": ["1", "2"]}, "answerKey": "1"},
        *("question+choices+answerKey", "q\n\n1. w\n2. x\n\nw"),
    ),
    "openbook": (
        {"question_stem": "q", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": "A"},
        *("question_stem+choices+answerKey", "q\n\nA. w\nB. x\n\nw"),
    ),
    "hellaswag": (
        {"ctx": "q", "endings": ["w", "x", "y", "z"], "label": "3"},
        *("ctx+endings+label", "q\n\nz"),
    ),
    "hh": ({"chosen": HH, "rejected": "x"}, "chosen", "hello\n\nYes.\n\nAre you a bot?\n\nNo."),
    "preference": (
        {"input": {"messages": DIALOGUE[:1], "tools": []}, "preferred_output": DIALOGUE[1:2]},
        *("input+preferred_output", "hello\n\nYes."),
    ),
    "oasst tree": (
        {
            "message_tree_id": "1",
            "prompt": {
                **{"text": "q", "role": "prompter"},
                "replies": [
                    {"text": "worse", "role": "assistant", "rank": 1, "replies": []},
                    {"text": "a", "role": "assistant", "rank": 0, "replies": [{"text": "open", "role": "prompter"}]},
                ],
            },
        },
        *("prompt", "q\n\na"),
    ),
    "sharegpt system": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        *("system+conversations", "s\n\nq\n\na"),
    ),
    "lmsys": ({"conversation": DIALOGUE[:2], "model": "x"}, "conversation", "hello\n\nYes."),
}
PLAIN_TEXT = [{"text": "a b", "timestamp": "2", "url": "u"}, {"content": "a b", "path": "p", "lang": "c"}]


@pytest.mark.parametrize("name", SETS)
def test_known_sets_are_read_as_question_and_answer_without_a_remark(tmp_path: Path, name: str) -> None:
    row, field, plain = SETS[name]
    found = load(tmp_path, [row])
    assert (texts(found), found.report.field, found.report.loss) == ([plain], field, "completion")
    assert remarks(tmp_path, [row]) == []


@pytest.mark.parametrize("row", PLAIN_TEXT)
def test_corpora_are_plain_text(tmp_path: Path, row: dict[str, Any]) -> None:
    found = load(tmp_path, [row], tiny_tokenizer(CHATML))
    assert (found.report.chat_template, found.report.loss, found.report.kind) == (False, "all", "text")
    assert texts(found) == ["a b"]


@pytest.mark.parametrize("name", SETS)
def test_a_known_set_does_not_depend_on_the_order_of_its_columns(tmp_path: Path, name: str) -> None:
    row = SETS[name][0]
    assert load(tmp_path, [dict(reversed(row.items()))]).samples == load(tmp_path, [row]).samples


def test_mmlu_files_without_a_header_are_known(tmp_path: Path) -> None:
    found = load_text(tmp_path, "a_test.csv", "q,w,x,y,z,C\nr,w,x,y,z,A\n")
    assert texts(found) == ["q\n\nA. w\nB. x\nC. y\nD. z\n\nC", "r\n\nA. w\nB. x\nC. y\nD. z\n\nA"]


def test_rows_without_an_answer_are_skipped_and_counted(tmp_path: Path) -> None:
    choices = {"question": "q", "choices": ["w", "x"]}
    rows = [{**choices, "answer": answer} for answer in (0, -1, "", 7, 10**30, "w")]
    found = load(tmp_path, rows)
    assert found.report.skipped_because == {"has no answer": 2, "has an answer that is none of its choices": 2}
    assert found.report.rows_used == "0,5"
    squad = [{"context": "c", "question": "q", "answers": {"text": text}} for text in (["a"], [])]
    assert load(tmp_path, squad).report.skipped_because == {"has no answer": 1}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"question": "q", "choices": ["w"]}, "row 2: no field 'answer'"),
        ({"question": 3, "choices": ["w"], "answer": 0}, "row 2: its question is a number"),
        ({"question": "q", "choices": 3, "answer": 0}, "row 2: its choices or answers are a number"),
    ],
)
def test_a_later_row_of_another_shape_is_named(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load(tmp_path, [SETS["mmlu"][0], second])


def oasst(name: str, parent: str | None, text: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    role = "assistant" if text[0] == "a" else "prompter"
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, **more}


def test_threads_follow_the_best_rank_from_each_first_message(tmp_path: Path) -> None:
    rows = [
        oasst("4", "3", "q two"),  # before its parent
        oasst("1", None, "q one"),
        *(oasst("2", "1", "a worse", 1), oasst("3", "1", "a best", 0), oasst("9", "1", "a gone", 0, deleted=True)),
        *(oasst("5", "4", "a last"), oasst("6", "5", "q open")),
        *(oasst("7", None, "q other"), oasst("8", "8", "a circle")),
    ]
    found = load(tmp_path, rows)
    assert texts(found) == ["q one\n\na best\n\nq two\n\na last"]
    assert (found.report.rows, found.report.skipped_because) == (2, {"without a loss token": 1})
    assert load(tmp_path, rows, limit=1).report.rows == 1


def test_sharegpt_that_begins_with_the_assistant_loses_that_turn_and_counts_it(tmp_path: Path) -> None:
    turns = [{"from": "gpt", "value": "Hi!"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    system = {"from": "system", "value": "s"}
    found = load(
        tmp_path, [{"conversations": turns}, {"conversations": [system, *turns]}, {"conversations": turns[1:]}]
    )
    assert texts(found) == ["q\n\na", "s\n\nq\n\na", "q\n\na"]
    assert found.report.dropped_turns == 2
    assert found.report.line().endswith("2 turns before the first question dropped")
    only = load(tmp_path, [{"conversations": turns}, {"conversations": turns[:1]}])
    assert only.report.skipped_because == {"empty": 1}


# Remarks


@pytest.mark.parametrize(
    ("row", "option"),
    [
        ({"prompt": "q", "gold": "a"}, "prompt=prompt,completion=gold"),
        ({"prompt": "q", "passage": "c", "best_answer": "a"}, "prompt=prompt,context=passage,completion=best_answer"),
        ({"text": "long", "summary": "short"}, "prompt=text,completion=summary"),
        ({"text": "good film", "label": 1}, "prompt=text,completion=label"),
        (
            {"instruction": "q", "input": "c", "model_output": "a"},
            "prompt=instruction,context=input,completion=model_output",
        ),
        ({"problem": "q", "solution": "long", "final_answer": "4"}, "prompt=problem,completion=final_answer"),
        ({"messages": DIALOGUE[:1], "response": "a"}, "prompt=messages,completion=response"),
        ({"messages": DIALOGUE[:2], "problem": "q", "solution": "x"}, "prompt=problem,completion=solution"),
        ({"prompt": "is it 4?", "reply": "4"}, "prompt=prompt,completion=reply"),
    ],
)
def test_an_answer_that_is_not_read_is_said_once_with_the_option_that_reads_it(
    tmp_path: Path, row: dict[str, Any], option: str
) -> None:
    blank = {**row, option.rpartition("=")[2]: ""}
    said = remarks(tmp_path, [blank, row, row])
    assert len(said) == 1
    assert said[0].endswith(f"looks like an answer and is not read; --field {option} would")
    assert "set.jsonl row 2: " in said[0]
    found = load(tmp_path, [row], field=option)
    assert found.report.loss == "completion"
    assert str(row[option.rpartition("=")[2]]) in texts(found)[0]
    assert remarks(tmp_path, [row], field=option) == []


@pytest.mark.parametrize(
    "row",
    [
        QA,
        {"problem": "q", "solution": "so it is 4", "answer": "4"},
        {"prompt": "q", "answer_start": 3, "response_id": "x", "score": 1},
        {"prompt": "q", "chosen": DIALOGUE[:2], "rejected": [], "messages": DIALOGUE[:2]},
        {"messages": DIALOGUE, "answer": "a"},
        {"prompt": "q", "reply": None},
    ],
)
def test_what_is_no_lost_answer_is_not_said(tmp_path: Path, row: dict[str, Any]) -> None:
    assert remarks(tmp_path, [row]) == []


# --field prompt=..,completion=..


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("dolly", "prompt=instruction,context=context,completion=response"),
        ("orca", "system=system_prompt,prompt=question,completion=response"),
        ("context", "context=context,prompt=question,completion=answer"),
        ("math", "prompt=problem,completion=solution"),
    ],
)
def test_columns_that_are_spelled_out_give_what_detection_gives(tmp_path: Path, name: str, option: str) -> None:
    row, field, _ = SETS[name]
    found, detected = load(tmp_path, [row], field=option), load(tmp_path, [row])
    assert (found.samples, found.report.field) == (detected.samples, field)
    assert load(tmp_path, [QA], field="prompt=prompt,completion=completion").samples == load(tmp_path, [QA]).samples


def test_columns_may_hold_messages_commas_and_equals_signs(tmp_path: Path) -> None:
    row = {"a, b": DIALOGUE[:1], "c=d": DIALOGUE[1:2]}
    assert texts(load(tmp_path, [row], field="prompt=a, b,completion=c=d")) == ["hello\n\nYes."]
    assert parse_field("prompt=a, b,completion=c=d") == {"prompt": "a, b", "completion": "c=d"}
    assert parse_field("instruction") is None


@pytest.mark.parametrize("option", ["completion=a", "prompt=a,prompt=b", "promt=a", "prompt=", "prompt=a,foo=b", "=a"])
def test_roles_that_do_not_exist_are_usage_errors(option: str) -> None:
    with pytest.raises(OptionError, match="--field") as caught:
        PromptOptions(field=option)
    assert len(str(caught.value)) <= 300


def test_a_column_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for option, name in (("prompt=nope", "nope"), ("prompt=prompt,completion=nope", "nope")):
        with pytest.raises(PromptError, match=f"row 1: no field '{name}'"):
            load(tmp_path, [QA], field=option)
    with pytest.raises(PromptError, match="row 2: no field 'completion'"):
        load(tmp_path, [QA, {"prompt": "a"}], field="prompt=prompt,completion=completion")


# Content in parts

PICTURE = {"type": "image_url", "image_url": {"url": "x"}}


def test_parts_of_text_are_joined_before_a_template_sees_them(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one ", "image_url": None}, "two ", {"type": "input_text", "text": "three"}]
    whole = [{"role": "user", "content": "one two three"}, DIALOGUE[1]]
    for template in (CHATML, None):
        tokenizer = tiny_tokenizer(template)
        joined = load(tmp_path, [{"messages": [{"role": "user", "content": parts}, DIALOGUE[1]]}], tokenizer)
        assert joined.samples == load(tmp_path, [{"messages": whole}], tokenizer).samples
    assert join_parts([], "row") == ""


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (PICTURE, "holds an image"),
        ({"type": "image"}, "holds an image"),
        ({"type": "input_audio", "input_audio": {}}, "holds audio"),
        ({"type": "video", "video": "x"}, "holds a video"),
        ({"type": "file", "file": {}}, "holds a file"),
        ({"type": "thinking", "thinking": "x"}, "holds a part of type 'thinking'"),
        (3, "holds a part that is a number"),
    ],
)
def test_other_parts_are_refused_by_row_and_counted(tmp_path: Path, part: Any, reason: str) -> None:
    seen = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}, DIALOGUE[1]]}
    found = load(tmp_path, [seen, {"messages": DIALOGUE}, seen])
    assert (found.report.skipped_because, found.report.rows_used) == ({reason: 2}, "1")
    assert f"2 skipped (2 {reason})" in found.report.line()


def test_a_mark_for_a_picture_in_another_column_is_refused_and_a_word_is_not(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    llava = {"image": "a.jpg", "conversations": turns}
    assert load(tmp_path, [{**llava, "image": None}, llava]).report.skipped_because == {"holds an image": 1}
    assert load(tmp_path, [{"conversations": turns}]).report.skipped == 0
