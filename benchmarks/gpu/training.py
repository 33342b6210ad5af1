"""A training step under each kind of rule, against a free one."""

import argparse
from collections.abc import Callable

import torch

from benchmarks import training
from benchmarks.gpu.card import seconds

HEADER = ("rule", "step", "against a free one")


def rows(device: torch.device, *, layers: int = 8, hidden: int = 2048, tokens: int = 8192) -> list[tuple[str, ...]]:
    """Return a row for each rule: forward, backward and the optimizer's step."""
    options = argparse.Namespace(layers=layers, hidden=hidden, optimizer="adamw")
    model, _ = training._make(options)
    masks = {kind: training._mask(kind, model, 64) for kind in training.KINDS}
    model.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, 8192, (max(1, tokens // 512), min(tokens, 512)), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found, free = [], _time(step, device)
    found.append(("none", f"{1e3 * free:.1f} ms", ""))
    for kind, mask in masks.items():
        handle = training._constrain(optimizer, model, mask)
        held = _time(step, device)
        handle.remove()
        found.append((kind, f"{1e3 * held:.1f} ms", f"{held / free - 1:+.1%}"))
    return found


def _time(step: Callable[[], None], device: torch.device) -> float:
    return seconds(step, device, repeats=5)
