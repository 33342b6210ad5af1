"""Short runs of transformers' Trainer on a tiny Llama."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_runs import batch
from transformers import Trainer, TrainingArguments


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {name: tensor[0] for name, tensor in batch(number, rows=1).items()}


def train(model: nn.Module, folder: Path, callback: Any, resume: Any = None, **changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options | changes),
        train_dataset=Rows(),
        callbacks=[callback] if callback else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
