"""Writer of the Python file that hands a mask to peft's SHiRA.

SHiRA trains ``r * (in + out)`` entries of each linear layer, no more and no fewer, and asks a function for them without
saying which layer it is. The file's function knows the layers by their identity, and draws that many, seeded, from the
entries that the mask lets change. The file imports public names only.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

_EMBEDDING = re.compile(r"(?:^|[._])(?:wte|wpe|embed(?!_out)\w*|\w*_?embeddings?)(?:[._]|$)")

_TEXT = '''"""SHiRA (peft) on the entries that {name} lets change.

    from this_file import shira_config
    model = get_peft_model(model, shira_config(model))

r * (in + out) entries of a layer are trained, drawn with a seed from those that may change; no others are. The largest
r that all {count} layers of the mask allow is {largest}.{rest}
"""

import zlib
from pathlib import Path

import torch
from peft import ShiraConfig

import fisherkit

MASK = {path}
RANK = {largest}
WEIGHTS = {weights}


def shira_config(model, r=RANK, seed=0, mask=MASK):
    """A ShiraConfig for ``model``, which must not be wrapped by peft yet."""
    flags = fisherkit.load_mask(mask)
    names = {{weight: name for name, weight in fisherkit.find_weights(model, WEIGHTS).items()}}
    layers = {{
        path: names[module.weight]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight in names
    }}

    def mask_fn(base_layer, r, **kwargs):
        name, weight = names[base_layer.weight], base_layer.weight
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


def is_embedding(name: str) -> bool:
    """Return whether a weight's name is an embedding's, which SHiRA does not train: it takes linear layers."""
    return _EMBEDDING.search(name) is not None


def shira_text(
    mask: Path, ranks: Mapping[str, int], *, folder: Path | None, embeddings: int = 0, others: int = 0
) -> str:
    """Return the file's text.

    Args:
        mask: the mask's file.
        ranks: the largest r that each linear layer's mask allows, by the weight's name; above 0.
        folder: that the file will lie in; None where that is not known.
        embeddings: weights of the mask that are left out as embeddings.
        others: weights of the mask that are left out for other reasons.
    """
    rest = ""
    if embeddings:
        rest += f"\n{embeddings} weights of the mask are embeddings, which SHiRA does not train; they stay frozen."
    if others:
        rest += f"\n{others} weights of the mask are no linear layers, or let too little change, and stay frozen."
    return _TEXT.format(
        name=mask.name,
        count=len(ranks),
        largest=min(ranks.values()),
        rest=rest,
        path=_path_text(mask, folder),
        weights="[\n" + "".join(f"    {name!r},\n" for name in ranks) + "]",
    )


def _path_text(mask: Path, folder: Path | None) -> str:
    """Return the expression for the mask's path: from the file's own folder, so that both can be moved."""
    if folder is None:
        return f"Path({str(mask.resolve())!r})"
    return f"Path(__file__).parent / {Path(os.path.relpath(mask.resolve(), folder.resolve())).as_posix()!r}"
