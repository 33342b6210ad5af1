"""FGGM (arXiv 2601.18261) over a sequence of tasks: before each, a mask from the Fisher of its own data.

For every task, at the weights that the tasks before it left: extract the Fisher of the task's answers, let the rows
with the highest scores change (30 % of each matrix by default), train under that mask. What is in the folder is kept: a
run that was killed goes on with the task, and the step of it, where it was.

    out/fggm.json                                what is run, so that a folder is not continued with other tasks
    out/00-<task>/fisher.safetensors  fisher.json  layer_importance.json
    out/00-<task>/mask.safetensors  mask.json
    out/00-<task>/trainer/                       the Trainer's own checkpoints
    out/00-<task>/model/                         the weights after the task

In several processes (torchrun, accelerate launch) each calls ``run``: they measure and train together, and the first
one does what is done once. All of them must see the folder.
"""

import dataclasses
import gc
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from fisherkit.checkpoint.atomic import swap_in, write_json
from fisherkit.checkpoint.headers import parse_json
from fisherkit.checkpoint.hub import resolve_model
from fisherkit.checkpoint.index import open_index
from fisherkit.engine.ranks.start import open_ranks
from fisherkit.errors import CheckpointError, OptionError, ResumeError, TrainingError
from fisherkit.methods.extract.measure import extract
from fisherkit.methods.mask.build import mask
from fisherkit.options import ExtractOptions, MaskOptions
from fisherkit.training.callback import MaskedUpdate
from fisherkit.training.optimizer_hooks import Parity

T = TypeVar("T")
FORMAT = "fisherkit.fggm/1"
PAPER = MaskOptions(preset="fggm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One task of the sequence.

    Attributes:
        name: letters, digits, ``.``, ``_`` and ``-``; part of a folder's name.
        prompts: the task's data for ``extract``: questions and answers.
        data: anything else that the trainer's factory needs; not looked at.
    """

    name: str
    prompts: str | os.PathLike[str]
    data: Any = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise OptionError(f"the name of a task goes into a folder's name, so {self.name!r} is not possible")


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """Files that a task leaves."""

    fisher: Path
    mask: Path
    model: Path


MakeTrainer = Callable[[Path, Task, Path], Any]
"""Checkpoint folder of the current weights, task, folder for the Trainer's checkpoints -> a transformers Trainer."""


class FGGM:
    """A sequence of tasks, each trained under a mask of its own.

    Args:
        model: the checkpoint to start from: a folder, or ``org/name[@revision]``.
        tasks: in the order of training.
        out: a folder; made if need be, continued if it holds the same run.
        make_trainer: makes the Trainer of a task, see ``MakeTrainer``. The mask's callback is added to it here. As
            published: full fine-tuning, AdamW, learning rate 1e-5, weight decay 0.
        extract: how the Fisher is measured; over the answers (``loss="completion"``) by default.
        mask: how the mask is chosen; as published by default.
        parity: ``paper`` masks gradients, as published; None holds the updates themselves to the mask.
        say: gets the lines meant for a person; of several processes the first one alone speaks.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        tasks: Sequence[Task],
        out: str | os.PathLike[str],
        make_trainer: MakeTrainer,
        *,
        extract: ExtractOptions | None = None,
        mask: MaskOptions | None = None,
        parity: Parity = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if not tasks:
            raise OptionError("FGGM needs at least one task")
        self._model = os.fspath(model)
        self._tasks = tuple(tasks)
        self._out = Path(out)
        self._make_trainer = make_trainer
        self._extract = extract or ExtractOptions(loss="completion")
        self._mask = mask or PAPER
        self._parity = parity
        self._say = say

    def run(self) -> list[TaskFiles]:
        """Train all tasks, or those that an earlier run did not finish.

        Returns:
            What each task left, in order; the last model is the result.

        Raises:
            ResumeError: the folder holds another run.
            RankFailedError: another process of the run has failed.
            TrainingError: a Trainer saves no weights.
            FisherkitError: whatever extract, mask or the training refuses.
        """
        _join_processes()
        if _is_together() and dist.get_rank() > 0:
            self._say = lambda line: None
        _once(self._claim)
        done: list[TaskFiles] = []
        for number, task in enumerate(self._tasks):
            start = str(done[-1].model) if done else self._model
            done.append(self._run(task, start, self._out / f"{number:02d}-{task.name}"))
        return done

    def _claim(self) -> None:
        """Note what is run, or compare it with what was noted."""
        self._out.mkdir(parents=True, exist_ok=True)
        path = self._out / "fggm.json"
        measured = {
            key: value for key, value in dataclasses.asdict(self._extract).items() if key not in ("resume", "force")
        }
        wanted = {
            "format": FORMAT,
            "model": self._model,
            "tasks": [[task.name, os.fspath(task.prompts)] for task in self._tasks],
            "extract": measured,
            "mask": dataclasses.asdict(self._mask),
            "parity": self._parity,
        }
        wanted = json.loads(json.dumps(wanted, default=str))  # as it comes back from the file
        found = parse_json(path, path.read_bytes(), "note of the run") if path.exists() else None
        if found is None:
            write_json(path, wanted)
        elif found != wanted:
            odd = next(key for key in (*wanted, *found) if found.get(key) != wanted.get(key))
            raise ResumeError(f"{self._out}: holds a run with another {odd!r}; choose another folder")

    def _run(self, task: Task, start: str, folder: Path) -> TaskFiles:
        files = TaskFiles(folder / "fisher.safetensors", folder / "mask.safetensors", folder / "model")
        _once(lambda: folder.mkdir(exist_ok=True))
        if _once(files.model.is_dir):
            self._say(f"{task.name}: trained by an earlier run")
            return files
        if not _once(lambda: _is_whole(files.fisher)):
            self._say(f"{task.name}: measuring its Fisher at {start}")
            resume = _once(files.fisher.with_name(f"{files.fisher.name}.partial").exists)
            options = dataclasses.replace(self._extract, resume=resume, force=True)
            extract(start, task.prompts, files.fisher, options, distributed=_is_together(), say=self._say)
        if not _once(lambda: _is_whole(files.mask)):
            _once(lambda: _forget(mask(files.fisher, files.mask, dataclasses.replace(self._mask, force=True))))
        self._say(f"{task.name}: training under {files.mask}")
        self._train(task, start, folder, files)
        return files

    def _train(self, task: Task, start: str, folder: Path, files: TaskFiles) -> None:
        checkpoints = folder / "trainer"
        trainer = self._make_trainer(resolve_model(start).path, task, checkpoints)
        trainer.add_callback(MaskedUpdate(files.mask, parity=self._parity))
        trainer.train(resume_from_checkpoint=_once(lambda: _last_checkpoint(checkpoints)))
        staged = folder / "model.partial"
        _once(lambda: shutil.rmtree(staged, ignore_errors=True))
        _save_whole(trainer, staged)  # all call it: the parts of one model may lie in all of them

        has_tokenizer = getattr(trainer, "processing_class", None) is not None

        def finish() -> None:
            if not has_tokenizer:  # the next Fisher needs one
                AutoTokenizer.from_pretrained(resolve_model(start).path).save_pretrained(staged)
            swap_in(staged, files.model)

        _once(finish)
        del trainer
        gc.collect()  # weights and optimizer state of this task, before those of the next


def _save_whole(trainer: Any, folder: Path) -> None:
    """Save a Trainer's model as one checkpoint.

    Where accelerate keeps FSDP's checkpoints in parts, ``save_model`` writes nothing, and does not say so.

    Raises:
        TrainingError: it has written no weights.
    """
    plugin = getattr(getattr(getattr(trainer, "accelerator", None), "state", None), "fsdp_plugin", None)
    if plugin is None:
        trainer.save_model(str(folder))
    else:
        kept = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            trainer.save_model(str(folder))
        finally:
            plugin.set_state_dict_type(kept)
    _once(lambda: _refuse_without_weights(folder))


def _refuse_without_weights(folder: Path) -> None:
    try:
        open_index(folder)
    except (CheckpointError, OSError) as error:
        raise TrainingError(f"the Trainer's save_model wrote no weights that can be read ({error})") from error


def _join_processes() -> None:
    """Make the group of all processes, as the Trainer would, where a launcher has started several."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def _is_together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _once(act: Callable[[], T]) -> T:
    """Return what ``act`` gives in the first of all processes, to each of them; what it raises is raised in all."""
    if not _is_together():
        return act()
    with open_ranks(torch.device("cpu")) as ranks:
        return ranks.from_first(act)


def _forget(result: object) -> None:
    """Return nothing, for processes that cannot be sent the result."""


def _is_whole(file: Path) -> bool:
    """Return whether a Fisher or a mask is there with what is written beside it last."""
    return file.exists() and file.with_suffix(".json").exists()


def _last_checkpoint(folder: Path) -> str | None:
    """Return the Trainer's last checkpoint that is whole: its state is written last."""
    numbers = [int(entry.parent.name.rpartition("-")[2]) for entry in folder.glob("checkpoint-*/trainer_state.json")]
    return str(folder / f"checkpoint-{max(numbers)}") if numbers else None
