"""Run by test_training_ranks in a process of its own: gloo processes train two tasks of FGGM with the Trainer.

Arguments: how the model is spread (see ``KINDS``), number of processes, model, the folder of the run, a free port, and
the prompt files of the tasks.
"""

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from fisherkit.training import FGGM, Task

KINDS = ("alone", "ddp", "transformers", "accelerate")
"""One process; copies; FSDP2 by transformers as it loads the model; FSDP2 by accelerate, saved in parts."""
LEARNING_RATE = 1e-2


class SameEverywhere(TrainerCallback):  # type: ignore[misc]
    """At the end of a training all processes hold the same bits."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, weight in kwargs["model"].named_parameters():
            whole = getattr(weight, "full_tensor", lambda weight=weight: weight)().detach()
            every = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
            dist.all_gather(every, whole)
            assert all(torch.equal(whole, one) for one in every), name


class Dies(TrainerCallback):  # type: ignore[misc]
    """The second task is interrupted after three steps, once in a process."""

    died: ClassVar[list[bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).parent.name.startswith("01-") and state.global_step == 3 and not self.died:
            self.died.append(True)
            raise KeyboardInterrupt


def load(kind: str, folder: Path, world: int) -> Any:
    if kind != "transformers":
        return AutoModelForCausalLM.from_pretrained(folder)
    from transformers.distributed.configuration_utils import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=world))


def make_trainer(kind: str, folder: Path, checkpoints: Path, world: int) -> Trainer:
    drawing = torch.Generator().manual_seed(len(checkpoints.parent.name))
    ids = torch.randint(3, 100, (4 * world, 10), generator=drawing)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=4,
        per_device_train_batch_size=world if kind == "alone" else 1,
        learning_rate=LEARNING_RATE,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        ddp_backend=None if kind == "alone" else "gloo",
        save_strategy="no" if kind == "transformers" else "steps",  # which cannot resume what it has spread
        save_steps=2,
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"input_ids": one, "labels": one} for one in ids]
    callbacks = [Dies()] if kind == "alone" else [Dies(), SameEverywhere()]
    trainer = Trainer(model=load(kind, folder, world), args=arguments, train_dataset=rows, callbacks=callbacks)
    if kind == "accelerate":
        spread_with_accelerate(trainer)
    return trainer


def spread_with_accelerate(trainer: Trainer) -> None:
    """Turn on what accelerate has for FSDP2: by itself it does not where there are only CPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if state.distributed_type != DistributedType.FSDP:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    assert "SHARDED" in str(state.fsdp_plugin.state_dict_type)
    trainer.is_fsdp_enabled = True


def train_all(kind: str, world: int, model: str, out: str, prompts: list[str]) -> None:
    tasks = [Task(name=Path(path).stem, prompts=path) for path in prompts]
    said: list[str] = []
    make = lambda folder, task, checkpoints: make_trainer(kind, folder, checkpoints, world)  # noqa: E731
    with contextlib.suppress(KeyboardInterrupt):
        FGGM(model, tasks, out, make, say=said.append).run()
        raise AssertionError("was not interrupted")
    done = FGGM(model, tasks, out, make, say=said.append).run()
    assert [files.model.name for files in done] == ["model"] * len(tasks)
    again = FGGM(model, tasks, out, make, say=said.append).run()
    assert again == done
    if dist.is_initialized() and dist.get_rank() > 0:
        assert not said
    else:
        assert said[-1].endswith("trained by an earlier run")


def run(rank: int, kind: str, world: int, model: str, out: str, port: str, prompts: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if kind == "accelerate":  # as its launcher says it: only the first process loads weights when a model is loaded
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    train_all(kind, world, model, out, prompts)
    dist.destroy_process_group()


if __name__ == "__main__":
    kind, size = sys.argv[1], int(sys.argv[2])
    if kind == "alone":
        train_all(kind, size, sys.argv[3], sys.argv[4], sys.argv[6:])
    else:
        arguments = (kind, size, *sys.argv[3:6], sys.argv[6:])
        torch.multiprocessing.start_processes(run, arguments, nprocs=size, start_method="fork")
    sys.stdout.write("all held\n")
