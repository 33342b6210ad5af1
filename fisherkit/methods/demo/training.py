"""Training of the demo's models: windows of tokens, AdamW under a cosine, for so many steps or so many seconds.

Axes: W windows, T tokens.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fisherkit.progress import Say, Track

_IGNORED = -100  # the label that transformers takes no loss for


@dataclass(frozen=True, kw_only=True)
class Course:
    """Length and rates of a training run.

    Attributes:
        steps: optimizer steps at most, of one window each; a fast machine is done before its time is up.
        window: tokens per window.
        held_out: windows kept from training, for the loss that is said.
        learning_rate: of AdamW, at its height.
        embedding_rate: the same for the embedding, whose rows are met too rarely to learn at the other.
        seed: of the weights and of the order of the text.
    """

    steps: int = 1600
    window: int = 256
    held_out: int = 16
    learning_rate: float = 2e-3
    embedding_rate: float = 3e-2
    seed: int = 0


@dataclass(frozen=True)
class Windows:
    """Text to learn from: token ids and labels, both int64 [W, T]; no loss is taken where a label is -100."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int | None = None) -> "Windows":
        """Return windows ``start`` to ``stop``."""
        return Windows(self.ids[start:stop], self.labels[start:stop])


def windows(pieces: Iterable[tuple[list[int], bool]], course: Course) -> Windows:
    """Put pieces of text one after another and cut them into windows, which come in random order.

    Args:
        pieces: token ids, and whether they are to be learnt or only read.
        course: the size of windows, and the seed of their order.
    """
    ids: list[int] = []
    labels: list[int] = []
    for piece, learnt in pieces:
        ids += piece
        labels += piece if learnt else [_IGNORED] * len(piece)
    whole = len(ids) // course.window * course.window
    order = torch.randperm(whole // course.window, generator=torch.Generator().manual_seed(course.seed))
    cut = [torch.tensor(row[:whole], dtype=torch.int64).view(-1, course.window)[order] for row in (ids, labels)]
    return Windows(*cut)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: the matrices are too small to gain much from more.

    Two quiet cores are 1.4 times as fast; two cores that others use as well were over ten times slower, threads waiting
    for each other at the end of each small product.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def learn(model: LlamaForCausalLM, text: Windows, course: Course, seconds: float, track: Track, say: Say) -> None:
    """Train with AdamW under a cosine whose end is the last step or the last second, whichever is nearer.

    The first ``course.held_out`` windows are not learnt; their loss before and after is said.
    """
    held_out, learnt = text.part(0, course.held_out), text.part(course.held_out)
    optimizer = _optimizer(model, course)
    before, started, step, progress = mean_loss(model, held_out), time.monotonic(), 0, 0.0
    while progress < 1:
        track("training", int(100 * progress), 100)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(step, progress)
        at = step % len(learnt)
        _step(model, optimizer, learnt.part(at, at + 1))
        step += 1
        progress = max(step / course.steps, (time.monotonic() - started) / seconds)
    track("training", 100, 100)
    after, tokens = mean_loss(model, held_out), step * course.window
    say(f"Loss on text it has not seen: {before:.2f} before, {after:.2f} after {tokens:,} tokens")


def _optimizer(model: LlamaForCausalLM, course: Course) -> torch.optim.Optimizer:
    embedding = model.get_input_embeddings().weight
    rest = [parameter for parameter in model.parameters() if parameter is not embedding]
    groups = [
        {"params": [embedding], "peak": course.embedding_rate},
        {"params": rest, "peak": course.learning_rate},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, text: Windows) -> None:
    model(input_ids=text.ids, labels=text.labels, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _schedule(step: int, progress: float) -> float:
    """Return the share of the greatest learning rate: 20 steps of warm-up, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, text: Windows) -> float:
    """Return the mean negative log-likelihood per token that has a label, in nats."""
    total, tokens = 0.0, 0
    for ids, labels in zip(text.ids, text.labels, strict=True):  # one window at a time: logits are large
        counted = int((labels[1:] != _IGNORED).sum())
        if counted:
            total += counted * float(model(input_ids=ids[None], labels=labels[None], use_cache=False).loss)
        tokens += counted
    return total / max(tokens, 1)
