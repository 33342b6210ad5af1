"""Samples of a prompt set: their tokens under a chat template, and which of them count."""

import hashlib
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prompt_sets import DIALOGUE, QA, load, marked, texts
from tiny_tokenizers import BOS, CHATML, GEMMA, LLAMA, THINKING, CharTokenizer, tiny_tokenizer

from fisherkit.errors import OptionError, PromptError
from fisherkit.prompts.dataset import PromptReport, Sample, batches

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
        f"6 prompts, field prompt, chat template off, {report.truncated} truncated, 1 skipped (1 empty), "
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
