"""Chat templates: what they mark, refuse, leave out or never finish; tools; turns that do not count."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prompt_sets import DIALOGUE, QA, load, marked, texts
from tiny_tokenizers import CHATML, GEMMA, LLAMA, THINKING, CharTokenizer, tiny_tokenizer

from fisherkit.errors import OptionError, PromptError
from fisherkit.options import PromptOptions
from fisherkit.prompts import templates
from fisherkit.prompts.spans import common_length
from fisherkit.prompts.time_limit import within

# Generations that a template marks

MARKED = {  # the same text as without the marks
    "chatml": CHATML.replace(
        "\n{{ m.content }}<|im_end|>\n",
        "\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
    ),
    "llama": LLAMA.replace(
        "{{ m.content | trim }}<|eot|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot|>{% endgeneration %}"
        "{% else %}{{ m.content | trim }}<|eot|>{% endif %}",
    ),
    "gemma": GEMMA.replace(
        "{{ m.content | trim }}<|tail|>\n",
        "{% if m.role == 'assistant' %}{%- generation -%}{{ m.content | trim }}<|tail|>{%- endgeneration -%}"
        "{% else %}{{ m.content | trim }}<|tail|>{% endif %}{{ '\n' }}",
    ),
}
UNMARKED = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    DIALOGUE,
    DIALOGUE[:2],
    DIALOGUE[:3],
    [*DIALOGUE[:1], {"role": "assistant", "content": "user hello assistant hello <|eot|>"}, *DIALOGUE[2:]],
    [*DIALOGUE[:1], {"role": "assistant", "content": "  Yes. \n"}, *DIALOGUE],
]


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("loss", ["assistant", "completion"])
def test_marks_and_search_agree_where_both_exist(tmp_path: Path, name: str, loss: str) -> None:
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    by_marks = load(tmp_path, rows, tiny_tokenizer(MARKED[name]), loss=loss)
    by_search = load(tmp_path, rows, tiny_tokenizer(UNMARKED[name]), loss=loss)
    assert texts(by_marks) == texts(by_search)
    assert by_marks.samples == by_search.samples
    assert by_marks.report.skipped == 0


@pytest.mark.parametrize("name", MARKED)
def test_marks_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    tokenizer = tiny_tokenizer(MARKED[name])
    for turns in CONVERSATIONS:
        sample = load(tmp_path, [{"messages": turns}], tokenizer, loss="assistant").samples[0]
        oracle = tokenizer.apply_chat_template(
            turns,
            return_dict=True,
            return_assistant_tokens_mask=True,
            add_generation_prompt=turns[-1]["role"] == "user",
        )
        assert sample.ids == tuple(oracle["input_ids"])
        assert sample.counts == tuple(map(bool, oracle["assistant_masks"]))


def test_a_mark_is_followed_where_search_would_find_something_else(tmp_path: Path) -> None:
    header = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}assistant:{{ m.content }};"
        "{% endgeneration %}{% else %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt }}"
    )
    tokenizer = tiny_tokenizer(header)
    found = load(tmp_path, [{"messages": DIALOGUE}], tokenizer)
    assert marked(tokenizer, found.samples[0]) == "user:hello;assistant:Yes.;user:Are you a bot?;{assistant:No.;}"


def test_misplaced_marks_are_not_believed(tmp_path: Path) -> None:
    inside_a_macro = (  # transformers counts from the start of the macro's own output
        "{% macro turn(m) %}{{ m.role }}:{% generation %}{{ m.content }};{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ turn(m) }}{% else %}{{ m.role }}:{{ m.content }};"
        "{% endif %}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    tokenizer = tiny_tokenizer(inside_a_macro)
    found = load(tmp_path, [{"messages": DIALOGUE}], tokenizer, loss="assistant")
    assert marked(tokenizer, found.samples[0]) == "user:hello;assistant:{Yes.;}user:Are you a bot?;assistant:{No.;}"


def test_tokenizers_without_offsets_follow_marks_too(tmp_path: Path) -> None:
    row = {"messages": DIALOGUE}
    by_marks = load(tmp_path, [row], CharTokenizer(chat_template=MARKED["llama"]), loss="assistant")
    assert by_marks.samples == load(tmp_path, [row], CharTokenizer(chat_template=LLAMA), loss="assistant").samples


def test_common_length_is_that_of_the_slow_loop() -> None:
    words = ["", "a", "b", "ab", "aab", "aabb", "aaaa", "aaaab" * 9, "aaaab" * 8 + "b"]
    for a in words:
        for b in words:
            slow = next((n for n in range(min(len(a), len(b))) if a[n] != b[n]), min(len(a), len(b)))
            assert common_length(a, b) == common_length(list(a), list(b)) == slow


# Turns that do not count


def test_turns_of_weight_zero_do_not_count(tmp_path: Path) -> None:
    for template in (CHATML, MARKED["chatml"], None):
        tokenizer = tiny_tokenizer(template)
        turns = [dict(turn) for turn in DIALOGUE]
        plain = load(tmp_path, [{"messages": DIALOGUE}], tokenizer, loss="assistant").samples[0]
        turns[1]["weight"] = 0
        light = load(tmp_path, [{"messages": turns}], tokenizer, loss="assistant").samples[0]
        assert light.ids == plain.ids
        assert "{Yes." in marked(tokenizer, plain)
        assert "{Yes." not in marked(tokenizer, light)
        assert "{No." in marked(tokenizer, light)
        turns[3]["weight"] = 0
        with pytest.raises(PromptError, match="1 without a loss token"):
            load(tmp_path, [{"messages": turns}], tokenizer, loss="assistant")
        turns[1]["weight"] = turns[3]["weight"] = 1
        assert load(tmp_path, [{"messages": turns}], tokenizer, loss="assistant").samples[0] == plain


def test_an_answer_before_any_question_is_found(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    found = load(tmp_path, [{"messages": DIALOGUE[1:]}], tokenizer, loss="assistant")
    assert marked(tokenizer, found.samples[0]).startswith("<|im_start|>assistant\n{Yes.<|im_end|>}\n<|im_start|>user")


# Tools

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "default": None}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL_TURNS = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": "add"},
    {"role": "assistant", "content": "Four."},
]
TOOL_TEMPLATE = (
    "{% if tools %}tools:{{ tools | tojson }};{% endif %}{% for m in messages %}{{ m.role }}:"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %};{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)
RENDERED = 'user:What is two plus two?;assistant:{add {"a": 2, "b": 2};}tool:4;assistant:{Four.;}'


def test_tools_and_tool_turns_reach_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(TOOL_TEMPLATE)
    found = load(tmp_path, [{"messages": TOOL_TURNS}], tokenizer, loss="assistant")
    assert marked(tokenizer, found.samples[0]) == RENDERED
    shown = json.loads(json.dumps(TOOLS).replace(', "default": null', ""))
    for tools in (TOOLS, json.dumps(TOOLS)):
        found = load(tmp_path, [{"messages": TOOL_TURNS, "tools": tools}], tokenizer, loss="assistant")
        assert marked(tokenizer, found.samples[0]) == f"tools:{json.dumps(shown)};{RENDERED}"
    for none in ([], None, ""):
        found = load(tmp_path, [{"messages": TOOL_TURNS, "tools": none}], tokenizer, loss="assistant")
        assert marked(tokenizer, found.samples[0]) == RENDERED


def test_arguments_as_text_are_objects_for_templates_that_want_objects(tmp_path: Path) -> None:
    as_text = {**CALL, "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    turns = [TOOL_TURNS[0], {**TOOL_TURNS[1], "tool_calls": [as_text]}, *TOOL_TURNS[2:]]
    tokenizer = tiny_tokenizer(TOOL_TEMPLATE)
    assert marked(tokenizer, load(tmp_path, [{"messages": turns}], tokenizer, loss="assistant").samples[0]) == RENDERED
    text_only = TOOL_TEMPLATE.replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}")
    tokenizer = tiny_tokenizer(text_only)  # as DeepSeek's does
    assert marked(tokenizer, load(tmp_path, [{"messages": turns}], tokenizer, loss="assistant").samples[0]) == RENDERED


def test_calls_and_results_of_sharegpt_are_tool_turns(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "What is two plus two?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four."},
    ]
    tokenizer = tiny_tokenizer(TOOL_TEMPLATE)
    found = load(tmp_path, [{"conversations": turns, "tools": "[]"}], tokenizer, loss="assistant")
    assert marked(tokenizer, found.samples[0]) == RENDERED
    turns[1]["value"] = "add 2 2"
    assert "assistant:add 2 2;tool:4;" in texts(load(tmp_path, [{"conversations": turns}], tokenizer))[0]


def test_what_a_template_leaves_out_makes_the_row_unusable(tmp_path: Path) -> None:
    rows = [{"messages": TOOL_TURNS}, {"messages": DIALOGUE}]
    no_calls = load(tmp_path, rows, tiny_tokenizer(CHATML))
    assert no_calls.report.skipped_because == {"has tool calls that the chat template leaves out": 1}
    no_results = TOOL_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    found = load(tmp_path, rows, tiny_tokenizer(no_results))
    assert found.report.skipped_because == {"has tool results that the chat template leaves out": 1}


def test_without_a_template_calls_are_json(tmp_path: Path) -> None:
    assert json.dumps([CALL]) in texts(load(tmp_path, [{"messages": TOOL_TURNS}]))[0]


def test_tools_that_are_no_schemas_are_named(tmp_path: Path) -> None:
    for tools in ("hammer", ["hammer"], {"a": 1}, 3):
        with pytest.raises(PromptError, match="row 1: field 'tools' is not a list of JSON schemas"):
            load(tmp_path, [{"messages": DIALOGUE, "tools": tools}])


# Refusals


@pytest.mark.parametrize(
    ("turns", "template", "reason"),
    [
        ([DIALOGUE[0], DIALOGUE[0]], GEMMA, "refused by the chat template: Roles must alternate user/assistant"),
        (
            [{"role": "system", "content": "a"}, DIALOGUE[0], DIALOGUE[0]],
            GEMMA,
            "refused by the chat template: Roles must alternate user/assistant",
        ),
        (TOOL_TURNS, GEMMA, "refused by the chat template with a tool turn: Roles must alternate user/assistant"),
        (
            [{"role": "system", "content": "a"}, *TOOL_TURNS],
            GEMMA,
            "refused by the chat template with a tool turn: Roles must alternate user/assistant",
        ),
        (
            [{"role": "system", "content": "a"}, DIALOGUE[1]],
            GEMMA,
            "refused by the chat template: System role not supported",
        ),
    ],
)
def test_a_row_that_a_template_refuses_is_skipped_under_the_real_reason(
    tmp_path: Path, turns: list[Any], template: str, reason: str
) -> None:
    found = load(tmp_path, [{"messages": DIALOGUE}, {"messages": turns}], tiny_tokenizer(template))
    assert (found.report.skipped_because, found.report.rows_used) == ({reason: 1}, "0")
    assert f"1 skipped (1 {reason})" in found.report.line()


def test_a_template_that_refuses_everything_is_an_error_with_its_reason(tmp_path: Path) -> None:
    for template, reason in (
        ("{{ messages[0].nothing.more }}", "'dict object' has no"),
        ("{% nonsense %}", "unknown tag 'nonsense'"),
        ("{{ raise_exception('x' * 100000) }}", "xxx"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (f"{{{{ {'(' * 5000} 1 {')' * 5000} }}}}", "recursion|nested"),
    ):
        with pytest.raises(PromptError, match=f"1 refused by the chat template: .*({reason})") as caught:
            load(tmp_path, [QA], tiny_tokenizer(template))
        assert len(str(caught.value)) <= 300


def test_where_nothing_is_left_the_advice_fits_the_reason(tmp_path: Path) -> None:
    for row, template, advice in (
        (QA, "{% nonsense %}", "use --chat-template off"),
        ({"prompt": " "}, CHATML, "is prompt the right --field"),
        ({"prompt": "hello " * 300, "completion": "a"}, CHATML, "raise --max-length"),
    ):
        with pytest.raises(PromptError, match=f"no sample left of 1 row .*{advice}"):
            load(tmp_path, [row], tiny_tokenizer(template))


def test_reasons_do_not_grow_with_the_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {n}"} for n in range(50)]
    tokenizer = tiny_tokenizer(
        "{% if messages[0].content != 'a 49' %}{{ raise_exception(messages[0].content) }}{% endif %}a b"
    )
    found = load(tmp_path, rows, tokenizer)
    assert found.report.skipped == sum(found.report.skipped_because.values()) == 49
    assert len(found.report.skipped_because) == 9
    assert len(found.report.line()) < 300


# Templates without end

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}a"


def test_a_template_without_end_is_stopped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.3)
    before = threading.active_count()
    started = time.monotonic()
    with pytest.raises(PromptError, match=r"row 1: the chat template does not end \(stopped after 0.3 s\)"):
        load(tmp_path, [QA], tiny_tokenizer(LOOP))
    assert time.monotonic() - started < 5
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before  # nothing goes on in the background


def test_a_template_without_end_is_stopped_on_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.3)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            load(tmp_path, [QA], tiny_tokenizer(LOOP))
        except PromptError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert len(caught) == 1


@pytest.mark.parametrize("template", ["{{ 9**9**9 }}", "{% set x = 2 ** 3 %}a"])
def test_powers_are_refused_before_they_are_computed(tmp_path: Path, template: str) -> None:
    with pytest.raises(PromptError, match=r"computes powers"):
        load(tmp_path, [QA], tiny_tokenizer(template))
    assert load(tmp_path, [QA], tiny_tokenizer("** {{ messages[0].content }} {# 2**2 #}{{ '**' }}"), loss="all").samples


def test_a_time_limit_returns_raises_and_interrupts() -> None:
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    ended = threading.Event()

    def endless() -> None:
        try:
            while True:
                pass
        finally:
            ended.set()

    with pytest.raises(TimeoutError, match="stopped after"):
        within(0.1, endless)
    assert ended.wait(5)


# Options


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x"])
def test_template_variables_that_json_cannot_hold_are_usage_errors(value: Any) -> None:
    with pytest.raises(OptionError, match="--chat-template-kwargs holds what JSON cannot"):
        PromptOptions(chat_template_kwargs={"a": value})


def test_a_template_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    for template in (3, ["a"], {"default": 3}, {"a": "b"}):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(PromptError, match="refused by the chat template"):
            load(tmp_path, [QA], tokenizer)


def test_thoughts_and_tools_do_not_disturb_each_other(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(THINKING)
    found = load(tmp_path, [{"messages": DIALOGUE, "tools": TOOLS}], tokenizer, loss="assistant")
    assert found.samples == load(tmp_path, [{"messages": DIALOGUE}], tokenizer, loss="assistant").samples
