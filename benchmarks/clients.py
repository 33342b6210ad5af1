"""Matrix of what holds under the optimizers, adapters and tools that people use, measured and asserted line by line.

    python -m benchmarks.clients                # prints the tables of docs/training-matrix.md
    python -m benchmarks.clients mergekit       # one part, where mergekit has an environment of its own

Optimizers of torch and transformers, and of torchao, bitsandbytes, pytorch_optimizer, schedulefree, badam and
lomo_optim where they are installed; adapters of peft; mergekit (what it merges against what export meant). A line that
is not as expected ends the run with status 1: it can be run again with next year's versions. Six minutes on a core.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # torchao compiles; here it is to be right, not fast

import torch
from torch import nn
from transformers import Adafactor

from benchmarks.client_runs import RULES, Client, MakeOptimizer, Params, cell
from benchmarks.client_tools import print_adapters, print_mergekit


def _of(module: str, name: str, **options: Any) -> MakeOptimizer:
    return lambda params, model: getattr(importlib.import_module(module), name)(params, **options)


def _badam(params: Params, model: nn.Module) -> Any:
    named = list(model.named_parameters())
    inner = torch.optim.AdamW(params, lr=1e-3)
    return importlib.import_module("badam").BlockOptimizer(inner, named, switch_block_every=2, active_modules=[])


def _lookahead(params: Params, model: nn.Module) -> Any:
    inner = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)
    return importlib.import_module("pytorch_optimizer").Lookahead(inner, k=2)


def _accelerated(params: Params, model: nn.Module) -> Any:
    return importlib.import_module("accelerate").Accelerator(cpu=True).prepare(torch.optim.AdamW(params, lr=1e-3))


RATE = {"lr": 1e-3, "weight_decay": 0.1}
CLIENTS = {
    "AdamW": Client("torch", _of("torch.optim", "AdamW", **RATE)),
    "AdamW, fused": Client("torch", _of("torch.optim", "AdamW", fused=True, **RATE)),
    "AdamW, foreach": Client("torch", _of("torch.optim", "AdamW", foreach=True, **RATE)),
    "AdamW in accelerate": Client("accelerate", _accelerated),
    "NAdam": Client("torch", _of("torch.optim", "NAdam", **RATE)),
    "SGD, momentum": Client("torch", _of("torch.optim", "SGD", lr=0.1, momentum=0.9, weight_decay=0.1)),
    "RMSprop": Client("torch", _of("torch.optim", "RMSprop", **RATE)),
    "Adafactor": Client("torch", _of("torch.optim", "Adafactor", **RATE)),
    "Muon": Client("torch", _of("torch.optim", "Muon", **RATE)),
    "LBFGS": Client("torch", _of("torch.optim", "LBFGS", max_iter=4, line_search_fn="strong_wolfe"), closure=True),
    "Adafactor (transformers)": Client("transformers", lambda p, m: Adafactor(p, relative_step=False, **RATE)),
    "AdamW8bit (torchao)": Client("torchao", _of("torchao.optim", "AdamW8bit", **RATE)),
    "AdamW4bit (torchao)": Client("torchao", _of("torchao.optim", "AdamW4bit", **RATE)),
    "AdamW8bit (bitsandbytes)": Client("bitsandbytes", _of("bitsandbytes.optim", "AdamW8bit", **RATE)),
    "Lion": Client("pytorch_optimizer", _of("pytorch_optimizer", "Lion", **RATE)),
    "AdEMAMix": Client("pytorch_optimizer", _of("pytorch_optimizer", "AdEMAMix", **RATE)),
    "SOAP": Client("pytorch_optimizer", _of("pytorch_optimizer", "SOAP", **RATE)),
    "Prodigy": Client("pytorch_optimizer", _of("pytorch_optimizer", "Prodigy", lr=1.0, d0=1e-3)),
    "ADOPT": Client("pytorch_optimizer", _of("pytorch_optimizer", "ADOPT", **RATE)),
    "Lookahead(AdamW)": Client("pytorch_optimizer", _lookahead),
    "ScheduleFreeAdamW": Client(
        "pytorch_optimizer", _of("pytorch_optimizer", "ScheduleFreeAdamW", **RATE), refused=True
    ),
    "SPlus": Client("pytorch_optimizer", _of("pytorch_optimizer", "SPlus", **RATE), refused=True),
    "LOMO": Client(
        "pytorch_optimizer", lambda p, m: importlib.import_module("pytorch_optimizer").LOMO(m), refused=True
    ),
    "AdamWScheduleFree": Client("schedulefree", _of("schedulefree", "AdamWScheduleFree", **RATE), refused=True),
    "SGDScheduleFree": Client("schedulefree", _of("schedulefree", "SGDScheduleFree", **RATE), refused=True),
    "RAdamScheduleFree": Client("schedulefree", _of("schedulefree", "RAdamScheduleFree", **RATE), refused=True),
    "Lomo": Client("lomo_optim", lambda p, m: importlib.import_module("lomo_optim").Lomo(m, lr=1e-3), refused=True),
    "BlockOptimizer (BAdam)": Client("badam", _badam, refused=True),
}


PARTS = ("full", "lora", "adapters", "mergekit")
LEGEND = """
- *holds*: frozen entries keep their bits; less than 1e-5 of a change lies in a hard subspace; a shield and a layer
  scale (0.1) give what their formula says to 1e-3 of the update.
- a share (bfloat16): what of the change of the saved weights lies in the subspace, after 20 steps.
- *rounds* (bfloat16): every weight is within one rounding of the formula.
- *refused*: by name, before the first step. *-*: does not train this without a rule either."""


def main() -> None:
    """Measure, print Markdown, and say on stderr what is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all otherwise")
    parts = parser.parse_args().parts or PARTS
    torch.set_num_threads(1)
    odd: list[str] = []
    print(_versions())
    with tempfile.TemporaryDirectory(prefix="fisherkit-") as folder:
        if "full" in parts:
            print(LEGEND)
            _print_matrix(False, Path(folder), odd)
        if "lora" in parts and importlib.util.find_spec("peft"):
            _print_matrix(True, Path(folder), odd)
        if "adapters" in parts:
            print_adapters(odd)
        if "mergekit" in parts:
            print_mergekit(Path(folder), odd)
    for line in odd:
        print(f"not as expected: {line}", file=sys.stderr)
    sys.exit(bool(odd))


def _versions() -> str:
    packages = dict.fromkeys(
        ("torch", "transformers", "peft", *(client.package for client in CLIENTS.values()), "mergekit")
    )
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages if importlib.util.find_spec(name)]
    return f"Measured by `python -m benchmarks.clients` with {', '.join(found)}."


def _print_matrix(lora: bool, folder: Path, odd: list[str]) -> None:
    print(f"\n**{'LoRA' if lora else 'Full fine-tuning'}**\n")
    columns = [(dtype, rule) for dtype in (torch.float32, torch.bfloat16) for rule in RULES]
    heads = [f"{rule}, {'fp32' if dtype is torch.float32 else 'bf16'}" for dtype, rule in columns]
    print(f"| optimizer | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, client in CLIENTS.items():
        if importlib.util.find_spec(client.package) is None:
            continue
        cells = []
        for dtype, rule in columns:
            found = cell(client, rule, dtype, lora=lora, folder=folder)
            cells.append(found)
            if not _is_expected(client, rule, dtype, lora, found):
                odd.append(f"{name}, {'LoRA' if lora else 'full'}, {rule}, {dtype}: {found}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _is_expected(client: Client, rule: str, dtype: torch.dtype, lora: bool, found: str) -> bool:
    if found == "-":  # the optimizer itself cannot train this
        return True
    if client.refused or (lora and rule == "mask"):
        return found == "refused"
    if dtype is torch.float32 or rule == "mask":
        return found == "holds"
    if rule == "subspace":
        return found == "holds" or float(found.rstrip(" %")) < 40
    return found in ("holds", "rounds")


if __name__ == "__main__":
    main()
