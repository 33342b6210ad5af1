"""Masks whose layers may change to different degrees, for what other tools take from them."""

import json
from pathlib import Path

import numpy as np
from mask_oracle import read_masks, write

from fisherkit import MaskOptions, mask

MODULES = ("self_attn.q_proj", "mlp.up_proj")


def graded(folder: Path, layers: int = 12, *, of: int | None = 12, outside: tuple[str, ...] = ()) -> Path:
    """A global mask under which later layers may change more, and the first not at all.

    Args:
        folder: to write into.
        layers: that the mask speaks of, the first ones.
        of: layers of the model, as extract notes them; None notes nothing.
        outside: more weights, in no layer.
    """
    arrays = {
        f"model.layers.{layer}.{module}.weight": np.full((10, 4), layer * (1 + (module == MODULES[1])), np.float32)
        + np.arange(40, dtype=np.float32).reshape(10, 4) / 8
        for layer in range(layers)
        for module in MODULES
    }
    arrays |= {name: np.arange(40, dtype=np.float32).reshape(10, 4) for name in outside}
    fisher = write(folder / "fisher.safetensors", arrays, architecture="LlamaForCausalLM")
    if of is not None:
        sidecar = json.loads(fisher.with_suffix(".json").read_text()) | {"layers": of, "blocks": "model.layers"}
        fisher.with_suffix(".json").write_text(json.dumps(sidecar))
    options = MaskOptions(train="top", aggregate="none", scope="global", force=True)
    return mask(fisher, folder / "mask.safetensors", options).path


def densities(path: Path) -> dict[int, float]:
    """The share of each layer that may change."""
    flags = {name: own for name, own in read_masks(path).items() if ".layers." in name}
    layers = sorted({int(name.split(".")[2]) for name in flags})
    of = {n: np.concatenate([f.ravel() for name, f in flags.items() if f".{n}." in name]) for n in layers}
    return {layer: float(found.mean()) for layer, found in of.items()}
