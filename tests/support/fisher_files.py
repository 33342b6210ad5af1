"""Small Fisher files as extract writes them, with the statistics beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fisherkit.checkpoint.content import content_sha256
from fisherkit.kernels.stats import TensorStats, tensor_stats

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")


def fisher_tensors(*, layers: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A Fisher whose last layer has no v_proj, layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.{module}.weight": torch.randn(6, 40, generator=generator).pow(4).bfloat16() * 1e-6
        for layer in range(layers)
        for module in MODULES
        if not (layer == layers - 1 and module == "self_attn.v_proj")
    }


def sidecar(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """What extract writes beside the file."""
    stats = {name: tensor_stats(tensor) for name, tensor in tensors.items()}
    keys = ("sum", "mean", "max", "zeros", "nonfinite")
    return {
        "format": "fisherkit.fisher/1",
        "fisherkit": "0.1.0",
        "created": "2026-01-02T03:04:05Z",
        "kind": "fisher",
        "file": path.name,
        "file_bytes": path.stat().st_size
        if path.is_file()
        else sum(f.stat().st_size for f in path.glob("*.safetensors")),
        "content_sha256": content_sha256(path),
        "model": {"id": "org/tiny", "revision": None, "architecture": "LlamaForCausalLM"},
        "prompts": {"source": "builtin", "rows": 200, "samples": 200, "loss": "all"},
        "estimator": {"name": "empirical", "labels": "data", "reduction": "mean", "layers": None},
        "run": {"engine": "stream", "group_size": 8, "store": "bf16"},
        "blocks": "model.layers",
        "tensors": {
            name: {"shape": list(tensors[name].shape), **{key: getattr(found, key) for key in keys}}
            for name, found in stats.items()
        },
        "histogram": sum(stats.values(), TensorStats()).histogram.to_json(),
    }


def write_fisher(path: Path, tensors: Mapping[str, Tensor] | None = None, *, statistics: bool = True) -> Path:
    """A Fisher at ``path``: ``.pt``, ``.safetensors`` or, without suffix, a folder of two shards."""
    tensors = fisher_tensors() if tensors is None else tensors
    beside = path.with_suffix(".json")
    if path.suffix == ".pt":
        torch.save(dict(tensors), path)
    elif path.suffix == ".safetensors":
        save_file(dict(tensors), path, metadata={"format": "pt"})
    else:
        _write_shards(path, tensors)
        beside = path / "fisher.json"
    if statistics:
        beside.write_text(json.dumps(sidecar(tensors, path)))
    return path


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        shard = f"fisher-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, shard)
    (folder / "fisher.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
