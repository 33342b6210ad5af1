"""Models here: made from a config, loaded, trained for so many steps, and measured in one forward pass.

Axes: B items, T tokens. Steps are counted, not seconds: the same seed gives the same numbers on the same machine.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.forgetting.muon import Muon
from benchmarks.forgetting.text import Tokens

_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Course:
    """Length, rate and batches of a model's training: a warm-up, then a line down to zero."""

    steps: int
    rate: float
    batch: int = 16
    warmup: int = 4

    def pace(self, step: int) -> float:
        """Return the rate of a step as a share of the peak."""
        return min((step + 1) / self.warmup, 1 - step / self.steps)

    @property
    def peak_steps(self) -> float:
        """Length in steps at the peak rate."""
        return sum(map(self.pace, range(self.steps)))

    def changed(self, rate: float, length: int) -> "Course":
        """Return the course at a share of its rate, so many times as long."""
        return replace(self, rate=rate * self.rate, steps=length * self.steps, warmup=length * self.warmup)


class Score(NamedTuple):
    """Score of a set of items: the share whose every answer token is the most likely one, and the mean loss in nats.

    Greedy decoding gives the right answer exactly if each of its tokens is the most likely one after those before it,
    so one forward pass over question and answer says what generating would.
    """

    exact: float
    loss: float


def be_repeatable(threads: int) -> None:
    """Same seed, same numbers; and no progress bars."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward adds up in any order
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def new_llama(vocabulary: int, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Small, with tied embeddings, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        num_key_value_heads=max(1, hidden // 32),
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # sequences are short
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def load(folder: Path | str, device: str) -> Any:
    """A checkpoint, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of two axes inside the blocks, by name: what is trained here, and what masks speak of."""
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name}


def batch_of(rows: Sequence[Tokens], device: str) -> tuple[Tensor, Tensor]:
    """Ids and labels, both [B, T]; padded on the right, where causal attention never looks."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, _IGNORED)
    for at, (tokens, read) in enumerate(rows):
        ids[at, : len(tokens)] = torch.tensor(tokens)
        labels[at, read : len(tokens)] = ids[at, read : len(tokens)]
    return ids.to(device), labels.to(device)


def token_losses(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [B, T-1] of every token (0 where none is taken), and whether each is the most likely or of no account."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    wanted = labels[:, 1:]
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=_IGNORED)
    return flat.view_as(wanted), (logits.argmax(-1) == wanted) | (wanted == _IGNORED)


def loss_of(model: Any, rows: Sequence[Tokens], device: str) -> Tensor:
    """Mean over the tokens that count."""
    ids, labels = batch_of(rows, device)
    return token_losses(model, ids, labels)[0].sum() / (labels[:, 1:] != _IGNORED).sum()


def kl_from(model: Any, rows: Sequence[Tokens], taught: Sequence[Tensor], device: str) -> Tensor:
    """KL(teacher || model) in nats, the mean over all places of all rows.

    Args:
        model: the student.
        rows: B of them.
        taught: the teacher's log-probabilities of each row, [T, V].
        device: of the model.
    """
    ids, _ = batch_of(rows, device)
    found = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
    teacher = nn.utils.rnn.pad_sequence(list(taught), batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens, _ in rows], device=device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return (teacher.exp() * (teacher - found)).sum(-1)[real].mean()


@torch.no_grad()
def measure(model: Any, sets: dict[str, list[Tokens]], device: str, batch: int = 128) -> dict[str, Score]:
    """Score of each set of items; items of similar length go together, whatever their set."""
    model.eval()
    rows = sorted(
        ((name, row) for name, held in sets.items() for row in held), key=lambda pair: (len(pair[1][0]), pair[1])
    )
    exact, losses, counted = (dict.fromkeys(sets, 0.0) for _ in range(3))
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ids, labels = batch_of([row for _, row in part], device)
        lost, right = token_losses(model, ids, labels)
        per_item = zip(part, lost.sum(1).tolist(), right.all(1).tolist(), strict=True)
        for (name, (tokens, read)), loss, is_right in per_item:
            exact[name] += is_right
            losses[name] += loss
            counted[name] += len(tokens) - read
    return {name: Score(exact[name] / len(sets[name]), losses[name] / counted[name]) for name in sets}


def batches(rows: Sequence[Tokens], course: Course, seed: str) -> Iterator[list[Tokens]]:
    """Random order, over and over, a batch per step."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(course.steps):
        while len(order) < course.batch:
            order += rng.sample(range(len(rows)), len(rows))
        yield [rows[at] for at in order[: course.batch]]
        del order[: course.batch]


def learn_base(model: Any, data: Iterator[list[Tokens]], course: Course, device: str) -> None:
    """All weights: the matrices of the blocks by Muon at the course's rate, the rest by AdamW at a quarter of it."""
    blocks = list(matrices(model).values())
    held = {id(weight) for weight in blocks}
    rest = [weight for weight in model.parameters() if id(weight) not in held]
    optimizers = [Muon(blocks, course.rate), torch.optim.AdamW(rest, course.rate / 4, (0.9, 0.98), weight_decay=0.0)]
    _learn(model, data, course, device, optimizers)


def train(
    model: Any,
    data: Iterator[list[Tokens]],
    course: Course,
    device: str,
    *,
    weights: Sequence[nn.Parameter],
    watch: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """AdamW without weight decay: warm-up, then a line down to zero at the end of the course.

    Args:
        model: trained in place.
        data: a batch per step.
        course: steps and rate.
        device: of the model.
        weights: what the optimizer holds; nothing else changes.
        watch: called with the optimizer before the first step: where masks are put in force.
        penalty: added to the loss.
    """
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=course.rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    watch(optimizer)
    _learn(model, data, course, device, [optimizer], penalty)


def _learn(
    model: Any,
    data: Iterator[list[Tokens]],
    course: Course,
    device: str,
    optimizers: Sequence[torch.optim.Optimizer],
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    model.train()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for step, rows in enumerate(data):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * course.pace(step)
        loss = loss_of(model, rows, device)
        if penalty is not None:
            loss = loss + penalty()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
