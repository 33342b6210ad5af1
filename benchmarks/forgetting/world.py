"""World that all runs on one base share, on disk: the base, its Fishers and covariances, masks; items of a seed."""

import copy
import fcntl
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

import fisherkit
from benchmarks.forgetting import model as models
from benchmarks.forgetting import tasks
from benchmarks.forgetting.measures import TEXT
from benchmarks.forgetting.sizes import Size
from benchmarks.forgetting.text import Chat, Tokens, corpus, new_tokenizer
from fisherkit import ExtractOptions, MaskOptions

Look = Literal["data", "sampled", "prompts", "text"]
"""Fishers of the probes: by their answers, by labels that the base draws itself, by the prompts alone, and with plain
text among them."""
_TEXT_SHARE = 12
"""One row in so many of the base's is plain text."""
_TEXT_PROBES = 4
"""Where text is among the probes, one window to so many items."""


class World:
    """Shared things of one base; made when first asked for, by whichever process is first.

    Args:
        folder: where they are kept.
        size: see Size.
        base: number of the base, which is the seed of its weights, its items and its batches.
        given: a checkpoint, or ``org/name``, to take as base; None to train one.
    """

    def __init__(self, folder: Path, size: Size, base: int, given: str | None = None) -> None:
        self.folder, self.size, self.number, self._given = folder / f"base-{base}", size, base, given

    # The base.

    @cached_property
    def base(self) -> Path:
        """Folder of the base model."""
        if self._given is not None and not Path(self._given).is_dir():
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(self._given))
        return Path(self._given) if self._given is not None else self.made("base", self._train_base)

    @cached_property
    def chat(self) -> Chat:
        """Return the base's tokenizer and template."""
        return Chat.of(AutoTokenizer.from_pretrained(self.base))

    @cached_property
    def _model(self) -> Any:
        return models.load(self.base, self.size.device)

    def load_base(self) -> Any:
        """Return a copy of the base model, to be changed at will."""
        return copy.deepcopy(self._model)

    def _train_base(self, folder: Path) -> None:
        size, tokenizer = self.size, new_tokenizer()
        model: Any = models.new_llama(len(tokenizer), size.hidden, size.layers, seed=self.number).to(size.device)
        models.learn_base(model, self._base_batches(Chat.of(tokenizer)), size.base, size.device)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _base_batches(self, chat: Chat) -> Iterator[list[Tokens]]:
        size, rng = self.size, random.Random(f"base {self.number}")
        conversations = chat.tokens(tasks.base_items(size.base_items, f"base {self.number}"))
        text = self._windows(chat, self._pieces()[size.windows :])
        plain = size.base.batch // _TEXT_SHARE
        for _ in range(size.base.steps):
            yield rng.sample(conversations, size.base.batch - plain) + rng.sample(text, plain)

    def _pieces(self) -> list[str]:
        """Return pieces of plain text, four windows each, in one fixed random order; the first are held out."""
        text, length = corpus(self.size.text_bytes), 4 * self.size.window
        pieces = [text[start : start + length] for start in range(0, len(text) - length, length)]
        random.Random("text").shuffle(pieces)
        return pieces

    def _windows(self, chat: Chat, pieces: list[str]) -> list[Tokens]:
        return [window for piece in pieces for window in chat.windows(piece, self.size.window)]

    # What is measured.

    @cached_property
    def old_tests(self) -> dict[str, list[Tokens]]:
        """Test items of the base's tasks, and TEXT: held-out plain text."""
        count = self.size.old_items
        found = {
            name: self.chat.tokens(tasks.items(task, "test", count, f"test {name} {self.number}"))
            for name, task in tasks.BASE.items()
        }
        return found | {TEXT: self._windows(self.chat, self._pieces()[: self.size.windows])}

    def new_items(self, name: str, seed: int, split: tasks.Split) -> list[tasks.Item]:
        """Items of a new task as this seed has it."""
        count = self.size.task_items if split == "train" else self.size.test_items
        return tasks.items(tasks.new_task(name, seed), split, count, f"{split} {name} {seed}")

    # What methods may look at: the probes, of half of the old tasks.

    @cached_property
    def probes(self) -> list[tasks.Item]:
        """Old items that a method may look at."""
        return list(tasks.takes_turns(tasks.PROBED, "train", self.size.probes, f"probes {self.number}"))

    @cached_property
    def probe_rows(self) -> list[Tokens]:
        """Return the same as tokens."""
        return self.chat.tokens(self.probes)

    @cached_property
    def taught(self) -> list[Tensor]:
        """Log-probabilities [T, V] of the base at every place of every probe row."""
        with torch.no_grad():
            return [
                torch.log_softmax(self._model(input_ids=torch.tensor([ids], device=self.size.device)).logits[0], -1)
                for ids, _ in self.probe_rows
            ]

    def fisher(self, look: Look = "data") -> Path:
        """Measure the base's Fisher on the probes, with the covariances of its inputs; see Look."""

        def make(folder: Path) -> None:
            prompts = folder / "prompts.jsonl"
            if look in ("data", "sampled"):
                write_prompts(prompts, self.probes)
                options = self.extract_options(statistics="activations", labels=look)
            else:
                rows = [question for question, _ in self.probes] if look == "prompts" else self._with_text()
                kind = "prompt" if look == "prompts" else "text"
                prompts.write_text("".join(json.dumps({kind: row}) + "\n" for row in rows), encoding="utf-8")
                chat = "auto" if look == "prompts" else "off"
                options = self.extract_options(statistics="activations", loss="all", chat_template=chat, limit=0)
            fisherkit.extract(self.base, prompts, folder / "fisher.safetensors", options)

        return self.made(f"fisher-{look}", make) / "fisher.safetensors"

    def _with_text(self) -> list[str]:
        texts = self._pieces()[self.size.windows :][: max(1, self.size.probes // _TEXT_PROBES)]
        return [self.chat.text(item) for item in self.probes] + texts

    def extract_options(self, **changes: Any) -> ExtractOptions:
        """Return the options with which every Fisher here is measured."""
        given = {"limit": self.size.probes, "loss": "completion", "store": "fp32", "batch_tokens": 4096}
        return ExtractOptions(**{**given, "device": self.size.device, **changes})

    def mask(self, name: str, options: MaskOptions, look: Look = "data") -> Path:
        """A mask or subspace made of one of the base's Fishers."""

        def make(folder: Path) -> None:
            fisherkit.mask(self.fisher(look), folder / "mask.safetensors", options)

        return self.made(f"mask-{name}-{look}", make) / "mask.safetensors"

    def rank(self, share: float) -> int:
        """Directions that are this share of the base's width."""
        config = json.loads((self.base / "config.json").read_text())
        return max(1, round(share * int(config["hidden_size"])))

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder that one process makes while the others wait; there when it is whole."""
        done = self.folder / name
        if done.is_dir():
            return done
        done.parent.mkdir(parents=True, exist_ok=True)
        with done.with_name(f"{done.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.is_dir():
                staged = done.with_name(f"{done.name}.partial")
                shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed
                staged.mkdir()
                make(staged)
                staged.rename(done)
        return done


def write_prompts(path: Path, items: Sequence[tasks.Item]) -> Path:
    """As extract reads them."""
    rows = ({"prompt": question, "completion": answer} for question, answer in items)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
