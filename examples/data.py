"""What the examples share: questions and answers as token ids, and the Trainer's settings."""

import json
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, TrainingArguments


def read_rows(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows of ``{"prompt": ..., "completion": ...}``; the prompt's tokens do not count in the loss."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + answer
        rows.append({"input_ids": prompt + answer, "labels": labels})
    return rows


def pad(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Puts rows of different lengths into one batch."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # not looked at: its labels are -100
    return DataCollatorForSeq2Seq(tokenizer)


def settings(folder: Path, *, steps: int, rate: float) -> TrainingArguments:
    """AdamW without weight decay, as FGGM and MIGU were published."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        weight_decay=0.0,
        per_device_train_batch_size=4,
        report_to=[],
        save_steps=50,
    )
