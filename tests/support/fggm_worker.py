"""Run by test_training_ranks in a process of its own: two gloo processes train two tasks of FGGM with the Trainer.

Arguments: model, the folder of the run, a free port, and the prompt files of the tasks.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from fisherkit.training import FGGM, Task

WORLD = 2


class SameEverywhere(TrainerCallback):  # type: ignore[misc]
    """At the end of a training all processes hold the same bits."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, weight in kwargs["model"].named_parameters():
            every = [torch.empty_like(weight) for _ in range(WORLD)]
            dist.all_gather(every, weight.detach())
            assert torch.equal(*every), name


def make_trainer(folder: Path, task: Task, checkpoints: Path) -> Trainer:
    assert dist.get_world_size() == WORLD
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(line, return_tensors="pt").input_ids[0] for line in Path(task.prompts).read_text().splitlines()]
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=3,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"input_ids": one, "labels": one} for one in ids]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[SameEverywhere()])


def run(rank: int, model: str, out: str, port: str, prompts: list[str]) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    tasks = [Task(name=Path(path).stem, prompts=path) for path in prompts]
    said: list[str] = []
    done = FGGM(model, tasks, out, make_trainer, say=said.append).run()
    assert [files.model.name for files in done] == ["model"] * len(tasks)
    again = FGGM(model, tasks, out, make_trainer, say=said.append).run()
    assert again == done
    assert said[-1].endswith("trained by an earlier run")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run, (*sys.argv[1:4], sys.argv[4:]), nprocs=WORLD, start_method="fork")
    sys.stdout.write("all held\n")
