"""Other lines of benchmarks.clients: adapters of peft under each rule, and mergekit on what export writes for it."""

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.client_runs import LAYERS, SCALE, directions, make_model
from fisherkit.errors import TrainingError
from fisherkit.methods.export.configs import export
from fisherkit.options import ExportOptions
from fisherkit.training import constrain

QUERY = "model.layers.0.self_attn.q_proj.weight"
# Options by which one or the other kind can be made; the first that peft takes is used.
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"r": 4},
    {},
    {"feedforward_modules": []},
    {"total_step": 10},
    {"num_vectors": 8, "vector_length": 8, "topk": 2},
    {"block_size": 8},
    {"n_frequency": 10},
    {"variant": "road_1", "group_size": 64},
)
# Kinds that put something beside the weights: nothing of a masked weight moves.
_BESIDE = ("prompt", "p_tuning", "prefix", "cpt", "cartridge", "xlora", "adaption")
_SHARED = ("vblora", "unilora", "lily", "tinylora")  # one tensor for all layers


def print_adapters(odd: list[str]) -> None:
    """Print a line for each kind of adapter that peft can put on a projection; odd lines are added to ``odd``."""
    if importlib.util.find_spec("peft") is None:
        return
    peft = importlib.import_module("peft")
    print("\n**Adapters of peft on a weight that a rule speaks of**\n")
    print("| adapter | mask | subspace | scale |\n|---|---|---|---|")
    for kind in sorted(member.value.lower() for member in peft.PeftType):
        model = None if kind.startswith(_BESIDE) or kind.endswith("prompt_tuning") else _adapted(peft, kind)
        if model is None:
            continue
        cells = [_adapter_cell(model, rule) for rule in ("mask", "subspace", "scale")]
        lora = kind in ("lora", "adalora")
        wanted = ["refused", "held" if lora else "refused", "refused" if kind in _SHARED else "held"]
        if cells != wanted:
            odd.append(f"{kind}: {cells}, not {wanted}")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def _adapted(peft: Any, kind: str) -> Any:
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind.upper())]
    for options in _OPTIONS:
        try:
            return peft.get_peft_model(make_model(torch.float32), config(target_modules=["q_proj"], **options))
        except Exception:  # noqa: S112  # kinds differ in what they want, and in what they raise
            continue
    return None


def _adapter_cell(model: nn.Module, rule: str) -> str:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    mask: Any = {
        "mask": {QUERY: torch.zeros(64, 1, dtype=torch.bool)},
        "subspace": {f"{QUERY}.U": directions(64), f"{QUERY}.V": directions(64)},
        "scale": [1.0] * (LAYERS - 1) + [SCALE**-2],
    }[rule]
    try:
        constrain(optimizer, model, mask).remove()
    except TrainingError:
        return "refused"
    return "held"


def print_mergekit(folder: Path, odd: list[str]) -> None:
    """Merge with mergekit as export says, and compare every tensor with BASE + weight * (FT - BASE)."""
    if importlib.util.find_spec("mergekit") is None:
        return
    merge, config = importlib.import_module("mergekit.merge"), importlib.import_module("mergekit.config")
    options = importlib.import_module("mergekit.options")
    yaml = importlib.import_module("yaml")
    base, tuned = make_model(torch.float32), make_model(torch.float32)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(folder / name)
    shares = {0: 0.25, 1: 0.75}  # nothing is said of the last layer
    masks = {
        name: torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < shares[int(match[1])]
        for name, weight in base.named_parameters()
        if weight.ndim == 2 and (match := re.search(r"layers\.(\d+)\.", name)) and int(match[1]) in shares
    }
    save_file(masks, folder / "mask.safetensors")
    text = export(
        folder / "mask.safetensors",
        ExportOptions(to="mergekit", base=str(folder / "base"), tuned=str(folder / "tuned")),
    )
    merge.run_merge(
        config.MergeConfiguration.model_validate(yaml.safe_load(text)),
        str(folder / "merged"),
        options.MergeOptions(copy_tokenizer=False),
    )
    merged = {
        name: tensor
        for file in sorted((folder / "merged").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    wrong = []
    for name, weight in base.state_dict().items():
        match = re.search(r"layers\.(\d+)\.", name)
        layer = int(match[1]) if match else None
        own = [flags for key, flags in masks.items() if layer is not None and f"layers.{layer}." in key]
        share = sum(int(f.sum()) for f in own) / sum(f.numel() for f in own) if own else 1.0
        if not torch.allclose(merged[name], weight + share * 0.1, atol=1e-5):
            wrong.append(name)
    if wrong or len(merged) != len(base.state_dict()):
        odd.append(f"mergekit: {len(wrong)} of {len(merged)} tensors, such as {json.dumps(wrong[:1])}")
    trained = f"{len(shares)} of {LAYERS} layers"
    print(f"\n**mergekit** on a mask of {trained}: {len(merged) - len(wrong)} of {len(merged)} tensors as meant.")
