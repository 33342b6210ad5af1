"""FGGM over a sequence of tasks: before each, a new mask from the Fisher of its own answers.

    python examples/fggm_tasks.py MODEL OUT first.jsonl second.jsonl ...

Killed and started again, it goes on where it was. The result is the last task's ``model`` folder.
"""

from pathlib import Path

from common import arguments, make_trainer
from transformers import Trainer

from fisherkit.training import FGGM, Task


def main() -> None:
    """Train all tasks, one after the other."""
    parser = arguments(__doc__)
    parser.add_argument("tasks", type=Path, nargs="+", help="rows of prompt and completion; --steps are for each")
    options = parser.parse_args()

    def trainer_of(model: Path, task: Task, checkpoints: Path) -> Trainer:
        return make_trainer(model, Path(task.prompts), checkpoints, steps=options.steps, rate=1e-5)

    tasks = [Task(name=path.stem, prompts=path) for path in options.tasks]
    done = FGGM(options.model, tasks, options.out, trainer_of, say=print).run()
    print(done[-1].model)


if __name__ == "__main__":
    main()
