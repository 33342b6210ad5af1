"""How sets are scored that are no plain prompts: windows of text, multiple choice, other tokenizers; and refusals."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import score_oracle
import tiny
import torch
from tiny_tokenizers import CHATML, tiny_tokenizer

import fisherkit
from fisherkit.artefacts.score_samples import read_samples
from fisherkit.errors import CheckpointError, FisherkitError, OptionError, PromptError
from fisherkit.options import ScoreOptions
from fisherkit.prompts.choices import load_choices
from fisherkit.prompts.dataset import load_prompts
from fisherkit.prompts.tokenizer import load_tokenizer
from fisherkit.prompts.windows import is_plain_text, load_windows

Checkpoint = Callable[[str], Path]
TEXT = "The Ebro rises in Cantabria. It flows into the sea at Deltebre, south of Barcelona.\n\nThe Tagus is longer."


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Plain text


@pytest.mark.parametrize("window", [2, 3, 7, 1000])
def test_every_token_but_the_first_is_predicted_once(window: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    tokenizer = load_tokenizer(checkpoint("llama"))
    ids = tokenizer(TEXT).input_ids
    samples = load_windows(path, window, tokenizer, ScoreOptions(limit=0)).samples
    predicted = [token for one in samples for token, counts in zip(one.ids, one.counts, strict=True) if counts]
    assert predicted == ids[1:]
    assert max(len(one.ids) for one in samples) == min(window, len(ids))
    assert all(one.ids[0] == before.ids[-1] for before, one in itertools.pairwise(samples))
    first = len(tokenizer.decode(ids[:1], skip_special_tokens=True).encode())
    assert sum(one.text_bytes for one in samples) == len(TEXT.encode()) - first


def test_no_window_spans_two_texts_and_limit_counts_windows(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint("llama"))
    rows = write(tmp_path / "rows.jsonl", {"text": "One two three."}, {"text": "Four five six seven."})
    samples = load_windows(rows, 4, tokenizer, ScoreOptions(limit=0)).samples
    starts = [0] + [n for n, (a, b) in enumerate(itertools.pairwise(samples), 1) if a.ids[-1] != b.ids[0]]
    joined = [[*samples[n].ids] for n in starts]
    assert [ids[0] for ids in joined] == [tokenizer(text).input_ids[0] for text in ("One two three.", "Four five six")]
    assert [one.ids for one in load_windows(rows, 4, tokenizer, ScoreOptions(limit=2)).samples] == [
        one.ids for one in samples[:2]
    ]


def test_windows_score_what_transformers_makes_of_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path, folder = tmp_path / "text.txt", checkpoint("llama")
    path.write_text(TEXT)
    report = fisherkit.score(folder, {"text": path}, ScoreOptions(window=9, dtype="float32"))
    samples = load_windows(path, 9, load_tokenizer(folder), ScoreOptions()).samples
    model = score_oracle.load(folder)
    wanted = score_oracle.token_mean([score_oracle.loss(model, one) for one in samples], samples)
    assert report.checkpoints[0].sets["text"].loss == pytest.approx(wanted, abs=1e-5)
    assert report.sets["text"]["kind"] == "windows"


def test_prompts_stay_prompts_beside_windows(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert is_plain_text(tmp_path / "text.txt", None)
    assert not is_plain_text(prompts, None)
    sets = {"text": tmp_path / "text.txt", "prompts": prompts}
    report = fisherkit.score(checkpoint("llama"), sets, ScoreOptions(window=9))
    assert [one["kind"] for one in report.sets.values()] == ["windows", "prompt"]
    with pytest.raises(OptionError, match="--window: no prompt set is plain text"):
        fisherkit.score(checkpoint("llama"), prompts, ScoreOptions(window=9))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PromptError, match=r"empty\.txt: no text of two tokens"):
        fisherkit.score(checkpoint("llama"), tmp_path / "empty.txt", ScoreOptions(window=9))


# Multiple choice

MMLU = {"question": "Which one is a river?", "choices": ["Ebro", "Madrid", "Etna", "Malta"], "answer": 2}
ARC = {
    "question": "Which one is a city?",
    "choices": {"text": ["Ebro", "Madrid", "Etna"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
HELLASWAG = {"ctx": "He opens the door and", "endings": ["leaves.", "is a river.", "seven"], "label": "0"}
PLAIN = {"prompt": "The capital of Spain is", "options": [" Madrid", " a river in the north"], "gold": "B"}


@pytest.mark.parametrize(
    ("row", "column", "answers", "right"),
    [
        (MMLU, "choices", ["A", "B", "C", "D"], 2),
        ({**dict(zip("ABCD", MMLU["choices"], strict=True)), "question": "?", "answer": "B"}, "A", [*"ABCD"], 1),
        (ARC, "choices", ["Ebro", "Madrid", "Etna"], 1),
        (HELLASWAG, "endings", HELLASWAG["endings"], 0),
        (PLAIN, "options", PLAIN["options"], 1),
    ],
    ids=["MMLU", "MMLU by columns", "ARC", "HellaSwag", "plain"],
)
def test_the_choices_of_a_question_differ_in_the_answer_alone(
    row: dict[str, Any], column: str, answers: list[str], right: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(checkpoint("llama"))
    prompts, (question,) = load_choices(write(tmp_path / "q.jsonl", row), column, tokenizer, ScoreOptions())
    counted = [
        tokenizer.decode([token for token, counts in zip(one.ids, one.counts, strict=True) if counts])
        for one in prompts.samples
    ]
    assert [text.strip() for text in counted] == [answer.strip() for answer in answers]
    assert question.right == right
    assert question.lengths == tuple(map(len, answers))
    heads = {one.ids[: one.counts.index(True)] for one in prompts.samples}
    assert len({head[:3] for head in heads}) == 1


def test_the_right_choice_of_a_known_set_is_read_as_extract_reads_the_row(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from fisherkit.prompts.dataset import load_prompts

    tokenizer = load_tokenizer(checkpoint("llama"))
    for number, (row, column) in enumerate(((MMLU, "choices"), (ARC, "choices"), (HELLASWAG, "endings"))):
        path = write(tmp_path / f"{number}.jsonl", row)
        prompts, (question,) = load_choices(path, column, tokenizer, ScoreOptions())
        assert (
            prompts.samples[question.samples[question.right]]
            == load_prompts(path, tokenizer, ScoreOptions()).samples[0]
        )


def test_accuracies_are_those_of_the_slow_way(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As lm-evaluation-harness defines acc and acc_norm: log-likelihoods, and by characters, of each choice alone."""
    folder = checkpoint("qwen2")
    words = ["Madrid", " a", " river in the north of it", " 7", " the sea, and", " no one"]
    rows = [{"prompt": f"Number {n} is", "choices": words[n % 3 : n % 3 + 3], "answer": n // 4} for n in range(12)]
    path = write(tmp_path / "q.jsonl", *rows)
    out = tmp_path / "s.jsonl"
    report = fisherkit.score(folder, {"q": path}, ScoreOptions(choices="choices", dtype="float32"), samples=out)
    model, tokenizer = score_oracle.load(folder), load_tokenizer(folder)
    plain, normed, right_losses = 0, 0, []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            glue = "" if choice.startswith(" ") else " "
            context = tokenizer(row["prompt"]).input_ids
            ids = tokenizer(row["prompt"] + glue + choice).input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        plain += max(range(3), key=scores.__getitem__) == row["answer"]
        normed += max(range(3), key=lambda n: scores[n] / len(row["choices"][n])) == row["answer"]
        right_losses.append(-scores[row["answer"]])
    found = report.checkpoints[0].sets["q"]
    assert found.choices.questions == 12
    assert found.choices.accuracy == pytest.approx(plain / 12)
    assert found.choices.accuracy_norm == pytest.approx(normed / 12)
    assert 0 < plain < 12
    assert plain != normed
    assert found.loss * found.tokens == pytest.approx(sum(right_losses), abs=1e-4)
    assert [row["choice_losses"][row["right"]] for row in read_samples(out)] == pytest.approx(right_losses, abs=1e-4)


def test_questions_that_cannot_be_asked_are_left_out_and_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint("llama"))
    rows = write(
        tmp_path / "q.jsonl", MMLU, {**MMLU, "answer": -1}, {**MMLU, "choices": ["one"]}, {**MMLU, "answer": "Z"}
    )
    prompts, questions = load_choices(rows, "choices", tokenizer, ScoreOptions())
    assert [question.row for question in questions] == [0]
    assert (prompts.report.rows, prompts.report.skipped) == (4, 3)
    assert set(prompts.report.skipped_because) == {
        "has no answer",
        "has fewer than two choices",
        "has an answer that is none of its choices",
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choices": ["one"]}, r"2 has fewer than two choices"),
        ({"answer": 7}, r"2 has an answer that is none of its choices"),
    ],
)
def test_a_set_without_a_question_that_can_be_asked_says_why(
    change: dict[str, Any], reason: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tokenizer, row = load_tokenizer(checkpoint("llama")), {**MMLU, **change}
    with pytest.raises(PromptError, match=rf"q\.jsonl: no sample left of 2 rows \({reason}\)"):
        load_choices(write(tmp_path / "q.jsonl", row, row), "choices", tokenizer, ScoreOptions())


def test_choices_are_refused_where_there_are_none(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    with pytest.raises(OptionError, match="--choices options: no prompt set has that column"):
        fisherkit.score(folder, prompts, ScoreOptions(choices="options"))
    no_key = write(tmp_path / "n.jsonl", {"prompt": "One?", "options": ["a", "b"]})
    with pytest.raises(PromptError, match="no field says which choice is right"):
        fisherkit.score(folder, no_key, ScoreOptions(choices="options"))
    odd = write(tmp_path / "o.jsonl", {"prompt": "One?", "options": "a, b", "answer": 0})
    with pytest.raises(PromptError, match=r"o\.jsonl row 1: its choices or answers are text, not a list"):
        fisherkit.score(folder, odd, ScoreOptions(choices="options"))
    with pytest.raises(OptionError, match="two runs"):
        ScoreOptions(choices="options", window=8)


# Tokenizers


def another_tokenizer(checkpoint: Checkpoint, folder: Path) -> Path:
    """The same weights, with a tokenizer that was trained on other text."""
    shutil.copytree(checkpoint("llama"), folder)
    text = [f"What is {n} plus {n}? Rivers rain down to good capital mornings." for n in range(50)]
    tiny_tokenizer().train_new_from_iterator(text, 390).save_pretrained(folder)
    return folder


def test_other_tokenizers_are_refused_by_name_and_compared_by_bytes(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    base, other = checkpoint("llama"), another_tokenizer(checkpoint, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"have different tokenizers.*--by-bytes") as caught:
        fisherkit.score([base, other], prompts)
    assert str(base) in str(caught.value)
    assert str(other) in str(caught.value)
    report = fisherkit.score([base, other], {"set": prompts}, ScoreOptions(by_bytes=True, dtype="float32"))
    first, second = (one.sets["set"] for one in report.checkpoints)
    assert report.measure == "bits_per_byte"
    assert second.change.difference == pytest.approx(second.bits_per_byte - first.bits_per_byte)
    assert (second.change.kl, second.change.agreement, second.change.worse) == (None, None, None)
    for folder, found in zip((base, other), (first, second), strict=True):
        alone = fisherkit.score(folder, {"set": prompts}, ScoreOptions(dtype="float32")).checkpoints[0].sets["set"]
        assert alone.bits_per_byte == pytest.approx(found.bits_per_byte)
        bits = found.loss * found.tokens / math.log(2)
        assert found.bits_per_byte == pytest.approx(bits / text_bytes(folder, prompts))


def test_answers_of_the_same_tokens_after_others_are_not_compared(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base, other = checkpoint("llama"), another_tokenizer(checkpoint, tmp_path / "other")
    rows = write(
        tmp_path / "rows.jsonl", {"prompt": "Good morning to you all, what is the capital?", "completion": "A"}
    )
    ours, theirs = (
        load_prompts(str(rows), load_tokenizer(folder), ScoreOptions()).samples[0] for folder in (base, other)
    )
    assert ours.ids != theirs.ids
    answers = [[token for token, counts in zip(one.ids, one.counts, strict=True) if counts] for one in (ours, theirs)]
    assert answers[0] == answers[1]
    report = fisherkit.score([base, other], {"set": rows}, ScoreOptions(by_bytes=True))
    change = report.checkpoints[1].sets["set"].change
    assert (change.kl, change.agreement) == (None, None)


def test_windows_of_two_tokenizers_are_not_compared(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base, other, path = checkpoint("llama"), another_tokenizer(checkpoint, tmp_path / "other"), tmp_path / "text.txt"
    path.write_text(TEXT)
    with pytest.raises(OptionError, match="windows of two tokenizers hold other text"):
        fisherkit.score([base, other], path, ScoreOptions(by_bytes=True, window=8))
    same = tiny.save("llama", tmp_path / "same")
    report = fisherkit.score([base, same], {"text": path}, ScoreOptions(by_bytes=True, window=8))
    assert report.checkpoints[1].sets["text"].change.difference == 0


def test_bytes_are_compared_on_rows_that_both_can_use(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A row whose answer one of the two cuts off is left out for both."""
    base, other = checkpoint("llama"), another_tokenizer(checkpoint, tmp_path / "other")
    prompt = "Good morning to you all, what is the capital?"
    lengths = [len(load_tokenizer(folder)(prompt).input_ids) for folder in (base, other)]
    assert lengths[0] != lengths[1]
    rows = write(
        tmp_path / "rows.jsonl", {"prompt": "Yes", "completion": " no"}, {"prompt": prompt, "completion": " Rome."}
    )
    options = ScoreOptions(by_bytes=True, max_length=min(lengths) + 1)
    report = fisherkit.score([base, other], {"set": rows}, options)
    assert [one.sets["set"].samples for one in report.checkpoints] == [1, 1]


def text_bytes(folder: Path, prompts: Path) -> int:
    """Bytes of all prompts but for what their first tokens stand for."""
    tokenizer = load_tokenizer(folder)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    firsts = [tokenizer.decode(tokenizer(text).input_ids[:1], skip_special_tokens=True) for text in texts]
    return sum(len(text.encode()) - len(first.encode()) for text, first in zip(texts, firsts, strict=True))


def test_files_of_a_tokenizer_may_differ_if_its_tokens_do_not(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    """Trainers leave truncation, padding and a chat template in the files that they save."""
    base, tuned, lines = checkpoint("llama"), tmp_path / "tuned", list[str]()
    shutil.copytree(base, tuned)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHATML
    tokenizer.backend_tokenizer.enable_truncation(512)
    tokenizer.save_pretrained(tuned)
    content = json.loads((tuned / "tokenizer.json").read_text())
    (tuned / "tokenizer.json").write_text(json.dumps(content | {"truncation": None, "padding": None}))
    report = fisherkit.score([base, tuned], {"set": prompts}, ScoreOptions(), say=lines.append)
    assert report.checkpoints[1].sets["set"].change.kl == 0
    report = fisherkit.score([tuned, base], {"set": prompts}, ScoreOptions(), say=lines.append)
    assert report.checkpoints[1].sets["set"].change.kl == 0
    assert any("has another chat template; prompts are rendered with that of" in line for line in lines)


# Refusals


def test_an_empty_set_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(PromptError, match=r"none\.jsonl: no prompts in it"):
        fisherkit.score(checkpoint("llama"), {"old": tmp_path / "none.jsonl"})
    with pytest.raises(OptionError, match="no prompts to score on"):
        fisherkit.score(checkpoint("llama"), {})


def test_a_set_without_answers_cannot_have_them_scored(checkpoint: Checkpoint, prompts: Path) -> None:
    with pytest.raises(PromptError, match="no loss token anywhere: --loss completion counts answers"):
        fisherkit.score(checkpoint("llama"), prompts, ScoreOptions(loss="completion"))


def test_a_loss_that_is_not_finite_names_checkpoint_set_and_row(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    folder, broken = checkpoint("gpt-neox"), tmp_path / "broken"
    model, tokenizer = score_oracle.load(folder), load_tokenizer(folder)
    before = {token for text in tiny.PROMPTS[:2] for token in tokenizer(text).input_ids}
    rare = next(token for token in tokenizer(tiny.PROMPTS[2]).input_ids if token not in before)
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = 3e38
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    with pytest.raises(FisherkitError, match=r"broken: the loss of old, row 3, is nan; the model overflows in float32"):
        fisherkit.score([folder, broken], {"old": prompts}, ScoreOptions(dtype="float32"))


def test_weights_that_are_not_finite_name_the_tensor(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    model = score_oracle.load(checkpoint("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(checkpoint("llama")).save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"broken.*layers\.1\.mlp\.up_proj\.weight holds 1 weights that are NaN"):
        fisherkit.score([checkpoint("llama"), tmp_path / "broken"], prompts)


def test_models_are_refused_that_make_no_sense(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    with pytest.raises(OptionError, match="is given twice"):
        fisherkit.score([folder, folder], prompts)
    with pytest.raises(OptionError, match="no MODEL to score"):
        fisherkit.score([], prompts)
    with pytest.raises(CheckpointError, match="no config"):
        fisherkit.score(tmp_path, prompts)
