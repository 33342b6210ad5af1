"""Shared by the examples: their arguments, questions and answers as token ids, a Trainer that saves its model."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def arguments(text: str | None, **files: str) -> argparse.ArgumentParser:
    """Return a parser of MODEL, the given files by name and help, OUT and ``--steps``.

    Args:
        text: the example's docstring.
        files: by name, help of files of ``{"prompt": ..., "completion": ...}`` rows.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    for name, help_text in files.items():
        parser.add_argument(name, type=Path, help=help_text)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    return parser


def read_rows(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return token ids and labels; the prompt's tokens do not count in the loss."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + answer
        rows.append({"input_ids": prompt + answer, "labels": labels})
    return rows


def pad(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Return what puts rows of different lengths into one batch."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # not looked at: its labels are -100
    return DataCollatorForSeq2Seq(tokenizer)


def make_trainer(
    model: Path, rows: Path, checkpoints: Path, *, steps: int, rate: float, callbacks: Sequence[TrainerCallback] = ()
) -> Trainer:
    """Return a Trainer of all weights under AdamW without weight decay, as FGGM and MIGU were published."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        learning_rate=rate,
        weight_decay=0.0,
        per_device_train_batch_size=4,
        report_to=[],
        save_steps=50,
    )
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=settings,
        train_dataset=read_rows(rows, tokenizer),
        data_collator=pad(tokenizer),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def train(
    model: Path, rows: Path, out: Path, *, steps: int, rate: float, callbacks: Sequence[TrainerCallback] = ()
) -> None:
    """Train, and save the model as ``out/model``."""
    trainer = make_trainer(model, rows, out / "trainer", steps=steps, rate=rate, callbacks=callbacks)
    trainer.train()
    trainer.save_model(str(out / "model"))
