"""Cost of a mask per training step: time and memory, with and without, on one model in one run.

    python benchmarks/training.py

Every kind of mask takes its turn on the same model and optimizer, round after round. Times are processor seconds of
one thread, the least of all rounds, so that a busy machine matters less. The cost is what ``optimizer.step()`` takes
longer, as a share of a whole free step (forward, backward, step). *Remembered* is what is held in memory during the
step: in turns, and all at once as with an optimizer that cannot be made to take its step in turns. Peaks are of
processes of their own. Then, how far masks on gradients (``parity="paper"``, as published) let go of what they hold.
Last (``--only bfloat16`` for this alone), what a hard subspace leaks in bfloat16, by optimizer and learning rate.
"""

import argparse
import atexit
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fisherkit.training import Handle, constrain
from fisherkit.training import optimizer_hooks as hooks

KINDS = ("rows", "elements", "subspace", "pull", "scale")
FREE = "none"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="per step")
    parser.add_argument("--rank", type=int, default=64, help="of the subspace")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizer", choices=["adamw", "adamw-fused", "sgd"], default="adamw")
    parser.add_argument("--only", choices=["bfloat16"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        _child(options)
        return
    if options.only:
        _print_bfloat16()
        return
    model, optimizer = _make(options)
    weights = sum(parameter.numel() for parameter in _matrices(model).values())
    print(
        f"Llama {options.layers}x{options.hidden} float32: {weights / 1e6:.0f} M weights masked of "
        f"{model.num_parameters() / 1e6:.0f} M, {options.tokens} tokens a step, {options.optimizer}"
    )
    _print_times(options, model, optimizer)
    _print_memory(options, model, optimizer)
    _print_drift()
    _print_bfloat16()


def _print_times(options: argparse.Namespace, model: Any, optimizer: torch.optim.Optimizer) -> None:
    masks = {kind: _mask(kind, model, options.rank) for kind in KINDS}
    steps: dict[str, list[float]] = {kind: [] for kind in (FREE, *KINDS)}
    wholes: list[float] = []
    _step(model, optimizer, options.tokens)  # the optimizer makes its state
    for _ in range(options.rounds):
        for kind, times in steps.items():
            handle = _constrain(optimizer, model, masks[kind]) if kind in masks else None
            whole, own = _step(model, optimizer, options.tokens)
            times.append(own)
            if handle is None:
                wholes.append(whole)
            else:
                handle.remove()
    whole, free = min(wholes), min(steps[FREE])
    print(f"{FREE:<10} step of the optimizer {1e3 * free:6.0f} ms of {1e3 * whole:6.0f} ms with forward and backward")
    for kind in KINDS:
        own = min(steps[kind])
        print(f"{kind:<10} step of the optimizer {1e3 * own:6.0f} ms: the whole takes {(own - free) / whole:+.1%}")


def _print_memory(options: argparse.Namespace, model: Any, optimizer: torch.optim.Optimizer) -> None:
    peaks = {kind: _peak(kind) for kind in (FREE, *KINDS)}
    print(f"peak memory {peaks[FREE]:,.0f} MB without a mask")
    for kind in KINDS:
        handle = _constrain(optimizer, model, _mask(kind, model, options.rank))
        by_parameter = hooks._by_parameter(handle.rules())
        turns = [turn for group in optimizer.param_groups for turn in hooks._turns(group["params"], by_parameter)]
        each = [sum(rule.nbytes for parameter in turn for rule in by_parameter.get(parameter, ())) for turn in turns]
        handle.remove()
        print(
            f"{kind:<10} remembered {max(each) / 1e6:4.0f} MB in turns, {sum(each) / 1e6:4.0f} MB at once; "
            f"peak {peaks[kind] - peaks[FREE]:+,.0f} MB"
        )


def _peak(kind: str) -> float:
    """Megabytes of a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _child(options: argparse.Namespace) -> None:
    model, optimizer = _make(options)
    if options.child != FREE:
        _constrain(optimizer, model, _mask(options.child, model, options.rank))
    for _ in range(2):
        _step(model, optimizer, options.tokens)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def _print_drift() -> None:
    """On a small model: 8 steps of AdamW at 1e-3, after 2 free ones."""
    small = argparse.Namespace(layers=3, hidden=128, optimizer="adamw")
    for parity in ("paper", None):
        found = {}
        for kind, decay in (("rows", 0.0), ("rows", 0.1), ("subspace", 0.0), ("scale", 0.0)):
            model, optimizer = _make(small)
            optimizer.param_groups[0].update(lr=1e-3, weight_decay=decay)
            for _ in range(2):
                _step(model, optimizer, 256)
            start = {name: weight.detach().clone() for name, weight in _matrices(model).items()}
            mask = _mask(kind, model, 16) if kind != "scale" else [1.0, 1.0, 100.0]
            handle = constrain(optimizer, model, mask, parity=parity)
            for _ in range(8):
                _step(model, optimizer, 256)
            handle.remove()
            moved = {name: weight.detach() - start[name] for name, weight in _matrices(model).items()}
            found[kind, decay] = _escaped(kind, mask, moved)
        print(
            f"{parity or 'default':<8} frozen rows move up to {found['rows', 0.0]:.1e} (weight decay 0.1: "
            f"{found['rows', 0.1]:.1e}); {found['subspace', 0.0]:.1e} of an update lies in the protected directions; "
            f"a layer of scale 0.1 moves {found['scale', 0.0]:.2f} of what the other moves"
        )


def _escaped(kind: str, mask: Any, moved: dict[str, Tensor]) -> float:
    """Return how far frozen entries moved, an update's protected share, or the last layer against the one before."""
    if kind == "rows":
        return max(float(change[~mask[name][:, 0]].abs().max()) for name, change in moved.items())
    if kind == "subspace":
        return max(float((mask[f"{name}.U"].mT @ change).norm() / change.norm()) for name, change in moved.items())
    norms = [sum(float(c.square().sum()) for n, c in moved.items() if f".layers.{layer}." in n) for layer in (1, 2)]
    return float((norms[1] / norms[0]) ** 0.5)


BFLOAT16_RUNS: dict[str, tuple[Callable[[list[nn.Parameter], float], torch.optim.Optimizer], tuple[float, ...]]] = {
    "adamw": (lambda p, lr: torch.optim.AdamW(p, lr=lr), (1e-3, 1e-4, 1e-5)),
    "adafactor": (lambda p, lr: torch.optim.Adafactor(p, lr=lr), (1e-3, 1e-4, 1e-5)),
    "sgd": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), (1e-3, 1e-4, 1e-5)),
}


def _print_bfloat16() -> None:
    """Print shares of the change of one matrix [256, 256] that lie in 32 protected directions, after 200 steps.

    *weights* is what is saved; *with residual* adds what the rule carries from step to step in bfloat16 because
    rounding kept it out of the weights; *rounded once* is the same run in float32, brought to bfloat16 at its end: no
    residual, however exact, can leak less than that one rounding.
    """
    print(f"{'bfloat16':<16}{'free':>8}{'weights':>9}{'with residual':>15}{'rounded once':>14}{'float32':>9}")
    for name, (make, rates) in BFLOAT16_RUNS.items():
        for rate in rates:
            free, _, _ = _leaks(make, rate, torch.bfloat16, held=False)
            weights, carried, _ = _leaks(make, rate, torch.bfloat16, held=True)
            exact, _, once = _leaks(make, rate, torch.float32, held=True)
            print(f"{name:<10}{rate:<6.0e}{free:>8.1%}{weights:>9.2%}{carried:>15.1e}{once:>14.2%}{exact:>9.0e}")


def _leaks(
    make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer], rate: float, dtype: torch.dtype, *, held: bool
) -> tuple[float, float, float]:
    """Return the protected share of the weights' change; with what the rule carries; and rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    model.weight.data = (0.02 * torch.randn(256, 256, generator=generator)).bfloat16().to(dtype)
    before = model.weight.detach().double()
    u, v = (torch.linalg.qr(torch.randn(256, 32, generator=generator))[0] for _ in range(2))
    optimizer = make(list(model.parameters()), rate)
    handle = constrain(optimizer, model, {"weight.U": u, "weight.V": v}) if held else None
    steady = u @ torch.randn(32, 256, generator=generator) + 0.3 * torch.randn(256, 256, generator=generator)
    for _ in range(200):
        model.weight.grad = (steady + torch.randn(256, 256, generator=generator)).to(dtype)
        optimizer.step()
    after = model.weight.detach()
    residuals = [getattr(rule, "_residual", None) for rule in handle.rules()] if handle else []
    carried = sum(residual.double() for residual in residuals if residual is not None)
    shares = [
        float((u.double().mT @ change).norm() / change.norm())
        for change in (after.double() - before, after.double() + carried - before, after.bfloat16().double() - before)
    ]
    return shares[0], shares[1], shares[2]


def _make(options: argparse.Namespace) -> tuple[Any, torch.optim.Optimizer]:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=11 * options.hidden // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).train()
    make: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=1e-5),
        "adamw-fused": lambda: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9),
    }
    return model, make[options.optimizer]()


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}


def _constrain(optimizer: torch.optim.Optimizer, model: nn.Module, mask: Any) -> Handle:
    """Hold to a mask; softly where it is a file, which is a soft subspace here."""
    return constrain(optimizer, model, mask, pull=0.2 if isinstance(mask, Path) else None, steps=1)


def _soft(model: nn.Module, rank: int) -> Path:
    """Write a file of directions of the inputs with a falling spectrum."""
    generator, held = torch.Generator().manual_seed(0), {}
    for name, weight in _matrices(model).items():
        held[f"{name}.V"] = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=generator))[0].contiguous()
        held[f"{name}.S"] = torch.arange(rank, 0, -1).float()
    path = Path(tempfile.mkdtemp(prefix="fisherkit-"), "soft.safetensors")
    save_file(held, path)
    atexit.register(shutil.rmtree, path.parent)
    return path


def _mask(kind: str, model: nn.Module, rank: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    weights = _matrices(model)
    if kind == "scale":
        return [float(4**layer) for layer in range(1 + max(int(name.split(".")[2]) for name in weights))]
    if kind == "pull":
        return _soft(model, rank)
    if kind == "subspace":
        basis: dict[str, Tensor] = {}
        for name, weight in weights.items():
            for side, size in zip("UV", weight.shape, strict=True):
                basis[f"{name}.{side}"] = torch.linalg.qr(torch.randn(size, rank, generator=generator))[0]
        return basis
    shapes = {n: (w.shape[0], 1) if kind == "rows" else tuple(w.shape) for n, w in weights.items()}
    return {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in shapes.items()}


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens: int) -> tuple[float, float]:
    """Processor seconds of a whole step, and of the optimizer's part in it."""
    ids = torch.randint(0, 8192, (max(1, tokens // 128), min(tokens, 128)))
    started = time.process_time()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    before = time.process_time()
    optimizer.step()
    done = time.process_time()
    optimizer.zero_grad()
    return done - started, done - before


if __name__ == "__main__":
    main()
