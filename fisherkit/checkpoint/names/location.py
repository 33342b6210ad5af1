"""Location of a tensor in its model, read off its checkpoint name.

A name is split at its block number: ``model.layers.3.self_attn.q_proj.weight`` is block 3 of ``model.layers``,
module ``self_attn.q_proj``. The blocks are the text model's; towers for images or sound keep their full names,
because their block 3 has nothing to do with the text model's. Standard library only.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Prefixes of parts that are not the text model. Whole words between dots and underscores: "vision_tower", "visual".
_TOWER = re.compile(
    r"(?:^|[._])(?:vision|visual|image|img|vit|video|audio|speech|whisper|sam|codec|mtp|projector|connector)(?:[._]|$)"
)
_BLOCK = re.compile(r"(?:(?P<prefix>.+?)\.)?(?P<layer>\d+)\.(?P<rest>.+)")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Location:
    """Location of a tensor in its model.

    Attributes:
        layer: number of its block, or None outside the text model's blocks.
        layer_name: ``model.layers.3``; outside the blocks, the block of its own tower or its module.
        module: ``self_attn.q_proj``, without the numbers of experts; outside the blocks, the full module name.
    """

    layer: int | None
    layer_name: str
    module: str


def block_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix before ``.N.`` that holds the most tensors of the text model; None where no name has a number.

    ``model.layers`` for Llama, ``h`` or ``transformer.h`` for GPT-2. Where there are only towers, the largest tower.
    Ties go to the prefix that comes first.
    """
    counts = Counter(match["prefix"] or "" for match in map(_BLOCK.fullmatch, names) if match)
    text = {prefix: count for prefix, count in counts.items() if not _TOWER.search(prefix)}
    candidates = text or counts
    return max(candidates, key=candidates.__getitem__, default=None)


def locate(name: str, blocks: str | None) -> Location:
    """Return the location of a tensor.

    ``.weight`` is dropped from the end of a module, other endings (``.bias``) are kept.

    Args:
        name: of the tensor in its checkpoint.
        blocks: prefix of the model's blocks, as block_prefix returns it, such as ``model.layers``.
    """
    stem = name.removesuffix(".weight")
    match = _BLOCK.fullmatch(stem)
    if match is None:
        return Location(None, stem, stem)
    layer_name = stem[: match.end("layer")]
    if (match["prefix"] or "") != blocks:
        return Location(None, layer_name, _NUMBER.sub("", stem))
    return Location(int(match["layer"]), layer_name, _NUMBER.sub("", match["rest"]))


def tower(name: str) -> str | None:
    """Return the part beside the text model that holds a tensor, such as ``model.vision_tower`` or ``mtp``; or None.

    A tower's word below a block's number (``model.layers.3.vision_expert``) does not count: that is the text model's.
    """
    words = name.split(".")
    for count, word in enumerate(words, start=1):
        if word.isdigit():
            return None
        if _TOWER.search(word):
            return ".".join(words[:count])
    return None
