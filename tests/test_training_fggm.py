"""FGGM over two tasks: each mask comes from the Fisher of its task at the weights before it, and holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from torch import Tensor
from training_runs import check_frozen
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import fisherkit
from fisherkit.checkpoint.index import open_index
from fisherkit.errors import OptionError, ResumeError
from fisherkit.options import ExtractOptions, MaskOptions
from fisherkit.training import FGGM, MaskedUpdate, Task

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ROWS = {
    "rivers": [("Name three rivers.", "Yes."), ("What is two plus two?", "Good morning."), ("No!", "Three rivers.")],
    "capitals": [("What is the capital?", "Yes."), ("Good morning to you all.", "Two plus two."), ("Yes.", "No!")],
}


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    made = []
    for name, rows in ROWS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
        made.append(Task(name=name, prompts=path, data=rows))
    return made


class Dies(TrainerCallback):  # type: ignore[misc]
    """Training ends in an error after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            raise KeyboardInterrupt


def make_trainer(folder: Path, task: Task, checkpoints: Path) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows: list[dict[str, Tensor]] = []
    for prompt, completion in task.data:
        ids = tokenizer(prompt + completion, return_tensors="pt").input_ids[0]
        rows.append({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=4,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Trainer(model=AutoModelForCausalLM.from_pretrained(folder), args=arguments, train_dataset=rows)


def test_every_task_changes_what_its_own_mask_allows(
    checkpoint: Callable[[str], Path], tasks: list[Task], tmp_path: Path
) -> None:
    done = FGGM(checkpoint("llama"), tasks, tmp_path / "run", make_trainer).run()
    before = pairs.tensors(checkpoint("llama"))
    flags = []
    for files in done:
        after = pairs.tensors(files.model)
        masks = fisherkit.load_mask(files.mask)
        flags.append(dict(masks))
        assert all(torch.equal(own, masks[name]) for name, own in flags[-1].items())
        check_frozen(before, after, flags[-1])
        assert all(own.sum() == int(0.3 * len(own)) for own in flags[-1].values())
        assert set(open_index(files.fisher).tensors) == set(masks)
        before = after
    assert any((flags[0][name] != flags[1][name]).any() for name in flags[0])
    made = json.loads(done[1].mask.with_suffix(".json").read_text())
    assert made["fisher"]["prompts"]["loss"] == "completion"
    assert (
        made["fisher"]["model"]["id"]
        != json.loads(done[0].mask.with_suffix(".json").read_text())["fisher"]["model"]["id"]
    )


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    checkpoint: Callable[[str], Path], tasks: list[Task], tmp_path: Path
) -> None:
    def dying(folder: Path, task: Task, checkpoints: Path) -> Trainer:
        trainer = make_trainer(folder, task, checkpoints)
        if task.name == "capitals":
            trainer.add_callback(Dies(3))
        return trainer

    whole = FGGM(checkpoint("llama"), tasks, tmp_path / "whole", make_trainer).run()
    with pytest.raises(KeyboardInterrupt):
        FGGM(checkpoint("llama"), tasks, tmp_path / "killed", dying).run()
    assert not (tmp_path / "killed" / "01-capitals" / "model").exists()
    said: list[str] = []
    trained: list[str] = []

    def counting(folder: Path, task: Task, checkpoints: Path) -> Trainer:
        trained.append(task.name)
        return make_trainer(folder, task, checkpoints)

    done = FGGM(checkpoint("llama"), tasks, tmp_path / "killed", counting, say=said.append).run()
    assert trained == ["capitals"]
    assert said[0] == "rivers: trained by an earlier run"
    wanted, found = pairs.tensors(whole[-1].model), pairs.tensors(done[-1].model)
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_a_folder_of_another_run_is_refused(
    checkpoint: Callable[[str], Path], tasks: list[Task], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    FGGM(checkpoint("llama"), tasks[:1], out, make_trainer).run()
    with pytest.raises(ResumeError, match="another 'tasks'"):
        FGGM(checkpoint("llama"), tasks, out, make_trainer).run()
    with pytest.raises(ResumeError, match="another 'mask'"):
        FGGM(checkpoint("llama"), tasks[:1], out, make_trainer, mask=MaskOptions(preset="fish")).run()
    with pytest.raises(ResumeError, match="another 'extract'"):
        FGGM(checkpoint("llama"), tasks[:1], out, make_trainer, extract=ExtractOptions(limit=2)).run()


def test_what_cannot_be_run_is_refused(checkpoint: Callable[[str], Path], tasks: list[Task], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least one task"):
        FGGM(checkpoint("llama"), [], tmp_path / "run", make_trainer)
    with pytest.raises(OptionError, match="'a/b'"):
        Task(name="a/b", prompts="x")


def test_the_callback_comes_from_the_package() -> None:
    assert fisherkit.load_mask.__module__.startswith("fisherkit.training")
    assert MaskedUpdate.__module__.startswith("fisherkit.training")
