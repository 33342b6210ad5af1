"""World that all runs of a size share, on disk: base model, Fisher and covariances, masks; items of a seed."""

import fcntl
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import fisherkit
from benchmarks.forgetting import model as models
from benchmarks.forgetting import tasks
from benchmarks.forgetting.measures import TEXT
from benchmarks.forgetting.sizes import Size
from benchmarks.forgetting.text import Chat, Tokens, corpus, new_tokenizer
from fisherkit import ExtractOptions, MaskOptions

_TEXT_SHARE = 12
"""One row in so many of the base's is plain text."""


class World:
    """Shared things of a size; made when first asked for, by whichever process is first.

    Args:
        folder: where they are kept.
        size: see Size.
        given: a checkpoint, or ``org/name``, to take as base; None to train one.
    """

    def __init__(self, folder: Path, size: Size, given: str | None = None) -> None:
        self.folder, self.size, self._given = folder, size, given

    # The base.

    @cached_property
    def base(self) -> Path:
        """Folder of the base model."""
        if self._given is not None and not Path(self._given).is_dir():
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(self._given))
        return Path(self._given) if self._given is not None else self._made("base", self._train_base)

    @cached_property
    def chat(self) -> Chat:
        """Return the base's tokenizer and template."""
        return Chat.of(AutoTokenizer.from_pretrained(self.base))

    def load_base(self) -> Any:
        """Load the base model, to be changed at will."""
        return models.load(self.base, self.size.device)

    def _train_base(self, folder: Path) -> None:
        size, tokenizer = self.size, new_tokenizer()
        model: Any = models.new_llama(len(tokenizer), size.hidden, size.layers, seed=0).to(size.device)
        models.learn_base(model, self._base_batches(Chat.of(tokenizer)), size.base, size.device)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _base_batches(self, chat: Chat) -> Iterator[list[Tokens]]:
        size, rng = self.size, random.Random("base")
        conversations = chat.tokens(self._base_items())
        text = self._windows(chat, self._pieces()[size.windows :])
        plain = size.base.batch // _TEXT_SHARE
        for _ in range(size.base.steps):
            yield rng.sample(conversations, size.base.batch - plain) + rng.sample(text, plain)

    def _base_items(self) -> list[tasks.Item]:
        return list(tasks.takes_turns(tasks.BASE, "train", self.size.base_items, "base"))

    def _pieces(self) -> list[str]:
        """Return pieces of plain text, four windows each, in one fixed random order; the first are held out."""
        text, length = corpus(self.size.text_bytes), 4 * self.size.window
        pieces = [text[start : start + length] for start in range(0, len(text) - length, length)]
        random.Random("text").shuffle(pieces)
        return pieces

    def _windows(self, chat: Chat, pieces: list[str]) -> list[Tokens]:
        return [window for piece in pieces for window in chat.windows(piece, self.size.window)]

    # What is measured.

    def old_tests(self) -> dict[str, list[Tokens]]:
        """Test items of the base's tasks, and TEXT: held-out plain text."""
        count = self.size.old_items
        found = {
            name: self.chat.tokens(tasks.items(task, "test", count, f"test {name}"))
            for name, task in tasks.BASE.items()
        }
        return found | {TEXT: self._windows(self.chat, self._pieces()[: self.size.windows])}

    def new_items(self, name: str, seed: int, split: tasks.Split) -> list[tasks.Item]:
        """Items of a new task as this seed has it."""
        count = self.size.task_items if split == "train" else self.size.test_items
        return tasks.items(tasks.new_task(name, seed), split, count, f"{split} {name} {seed}")

    def replayed(self, seed: int) -> list[Tokens]:
        """A hundredth of what the base learnt from, rows of plain text among them."""
        rng, items, pieces = random.Random(f"replay {seed}"), self._base_items(), self._pieces()[self.size.windows :]
        text = self._windows(self.chat, rng.sample(pieces, math.ceil(len(pieces) / 100)))
        return self.chat.tokens(rng.sample(items, math.ceil(len(items) / 100))) + text

    # What fisherkit makes of the base.

    @cached_property
    def fisher(self) -> Path:
        """Measure the base's Fisher on its own tasks' training items, with the covariances of its inputs."""
        return self._made("fisher", self._extract) / "fisher.safetensors"

    def _extract(self, folder: Path) -> None:
        rows = list(tasks.takes_turns(tasks.BASE, "train", self.size.probes, "probes"))
        prompts = write_prompts(folder / "prompts.jsonl", rows)
        options = self.extract_options(statistics="activations")
        fisherkit.extract(self.base, prompts, folder / "fisher.safetensors", options)

    def old_inputs(self, *, text: bool) -> Path:
        """Measure what goes into the base's layers on its own tasks' items, with windows of plain text among them."""

        def make(folder: Path) -> None:
            items = list(tasks.takes_turns(tasks.BASE, "train", self.size.probes, "probes"))
            texts = self._pieces()[self.size.windows :][: self.size.probes // 4] if text else []
            rows = [self.chat.text(item) for item in items] + texts
            prompts = folder / "prompts.jsonl"
            prompts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
            options = ExtractOptions(
                statistics="inputs", limit=0, chat_template="off", batch_tokens=4096, device=self.size.device
            )
            fisherkit.extract(self.base, prompts, folder / "old.safetensors", options)

        return self._made("inputs-text" if text else "inputs", make) / "old.safetensors"

    def extract_options(self, **changes: Any) -> ExtractOptions:
        """Return the options with which every Fisher here is measured."""
        return ExtractOptions(
            limit=self.size.probes,
            loss="completion",
            store="fp32",
            batch_tokens=4096,
            device=self.size.device,
            **changes,
        )

    def mask(self, name: str, options: MaskOptions) -> Path:
        """A mask or subspace made of the base's Fisher."""

        def make(folder: Path) -> None:
            fisherkit.mask(self.fisher, folder / "mask.safetensors", options)

        return self._made(f"mask-{name}", make) / "mask.safetensors"

    def rank(self, share: float) -> int:
        """Directions that are this share of the base's width."""
        config = json.loads((self.base / "config.json").read_text())
        return max(1, round(share * int(config["hidden_size"])))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder that one process makes while the others wait; there when it is whole."""
        done = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.is_dir():
                staged = self.folder / f"{name}.partial"
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
