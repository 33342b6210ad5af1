"""The Python file that hands a mask to peft's SHiRA.

SHiRA trains ``r * (in + out)`` entries of each linear layer, no more and no fewer, and asks a function for them without
saying which layer it is. The file's function knows the layers by their identity, and draws that many, seeded, from the
entries that the mask lets change.
"""

from collections.abc import Mapping
from pathlib import Path

_TEXT = '''"""SHiRA (peft) on the entries that {name} lets change.

    from this_file import shira_config
    model = get_peft_model(model, shira_config(model))

r * (in + out) entries of a layer are trained, drawn with a seed from those that may change; no others are. The largest
r that all {count} layers of the mask allow is {largest}.{rest}
"""

import zlib

import torch
from peft import ShiraConfig

import fisherkit
from fisherkit.checkpoint.names.spelling import spelling

MASK = {path!r}
RANK = {largest}
WEIGHTS = {weights}


def shira_config(model, r=RANK, seed=0, mask=MASK):
    """A ShiraConfig for ``model``, which must not be wrapped by peft yet."""
    flags = fisherkit.load_mask(mask)
    stored = {{spelling(name): name for name in WEIGHTS}}
    layers = {{name: module for name, module in model.named_modules() if spelling(name + ".weight") in stored}}
    if len(layers) != len(stored):
        raise ValueError(f"{{len(layers)}} of the {{len(stored)}} layers of {{mask}} are in this model")
    names = {{id(module): stored[spelling(name + ".weight")] for name, module in layers.items()}}

    def mask_fn(base_layer, r, **kwargs):
        name, weight = names[id(base_layer)], base_layer.weight
        free = flags[name].expand(weight.shape).flatten().nonzero().flatten()
        count = r * sum(weight.shape)
        if count > len(free):
            raise ValueError(f"{{name}}: r={{r}} needs {{count}} entries, {{len(free)}} may change; r={{RANK}} fits")
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        chosen = torch.zeros(weight.numel(), dtype=weight.dtype)
        chosen[free[torch.randperm(len(free), generator=generator)[:count]]] = 1
        return chosen.view(weight.shape).to(weight.device)

    config = ShiraConfig(r=r, target_modules=list(layers))
    config.mask_fn = mask_fn
    return config
'''


def shira_text(mask: Path, ranks: Mapping[str, int], *, left_out: int) -> str:
    """The file's text.

    Args:
        mask: the mask's file.
        ranks: the largest r that each linear layer's mask allows, by the weight's name; above 0.
        left_out: how many weights of the mask are not among them.
    """
    weights = "[\n" + "".join(f"    {name!r},\n" for name in ranks) + "]"
    rest = (
        f"\n{left_out} weights of the mask are no linear layers, or let too little change, and stay frozen."
        if left_out
        else ""
    )
    return _TEXT.format(
        name=mask.name,
        count=len(ranks),
        largest=min(ranks.values()),
        rest=rest,
        path=str(mask.resolve()),
        weights=weights,
    )
