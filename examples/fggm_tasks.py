"""FGGM over a sequence of tasks: before each, a new mask from the Fisher of its own answers.

    python examples/fggm_tasks.py MODEL OUT first.jsonl second.jsonl ...

Killed and started again, it goes on where it was. The result is the last task's ``model`` folder.
"""

import argparse
from pathlib import Path

from data import pad, read_rows, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from fisherkit.training import FGGM, Task


def main() -> None:
    """Train all tasks, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tasks", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=100, help="for each task")
    options = parser.parse_args()

    def make_trainer(model: Path, task: Task, checkpoints: Path) -> Trainer:
        tokenizer = AutoTokenizer.from_pretrained(model)
        return Trainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=settings(checkpoints, steps=options.steps, rate=1e-5),
            train_dataset=read_rows(Path(task.prompts), tokenizer),
            data_collator=pad(tokenizer),
            processing_class=tokenizer,
        )

    tasks = [Task(name=path.stem, prompts=path) for path in options.tasks]
    done = FGGM(options.model, tasks, options.out, make_trainer, say=print).run()
    print(done[-1].model)


if __name__ == "__main__":
    main()
