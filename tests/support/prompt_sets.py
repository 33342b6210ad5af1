"""Prompt sets written and loaded, and what is in them as text."""

import json
from pathlib import Path
from typing import Any

from tiny_tokenizers import BOS, tiny_tokenizer

from fisherkit.options import PromptOptions
from fisherkit.prompts.dataset import PromptSet, Sample, load_prompts

QA = {"prompt": "What is two plus two?", "completion": "Four."}
DIALOGUE = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Are you a bot?"},
    {"role": "assistant", "content": "No."},
]


def load(tmp_path: Path, rows: list[Any], tokenizer: Any = None, **options: Any) -> PromptSet:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_prompts(str(path), tokenizer or tiny_tokenizer(), PromptOptions(**options))


def load_text(tmp_path: Path, name: str, content: str | bytes, tokenizer: Any = None, **options: Any) -> PromptSet:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_prompts(str(path), tokenizer or tiny_tokenizer(), PromptOptions(**options))


def remarks(tmp_path: Path, rows: list[Any], **options: Any) -> list[str]:
    """What is said while a set is loaded."""
    said: list[str] = []
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    load_prompts(str(path), tiny_tokenizer(), PromptOptions(**options), say=said.append)
    return said


def texts(found: PromptSet, tokenizer: Any = None) -> list[str]:
    tokenizer = tokenizer or tiny_tokenizer()
    return [tokenizer.decode(sample.ids).removeprefix(BOS) for sample in found.samples]


def marked(tokenizer: Any, sample: Sample) -> str:
    """The sample's text with counted stretches in braces."""
    pieces, open_ = "", False
    for token, counted in zip(sample.ids, sample.counts, strict=True):
        pieces += ("{" if counted and not open_ else "}" if open_ and not counted else "") + tokenizer.decode([token])
        open_ = counted
    return pieces + "}" * open_
