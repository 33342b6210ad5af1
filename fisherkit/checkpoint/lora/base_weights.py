"""Places of a base checkpoint that hold the weights that an adapter speaks of.

Names are brought to one spelling, so it makes no difference whether experts are fused in the adapter, in the base, in
both or in neither. Standard library only; reads config.json and no tensor.
"""

import re
from dataclasses import dataclass

from fisherkit.checkpoint.folder.side_files import read_config
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.checkpoint.names.spelling import Piece, Shape, pieces

_EMBEDDINGS = ("model.embed_tokens.weight", "wte.weight", "gpt_neox.embed_in.weight", "word_embeddings.weight")
_HEAD = "lm_head.weight"
_TIE = "tie_word_embeddings"
_CONV1D = re.compile(r"(.*)\.(?:attn|crossattention|mlp)\.(?:c_attn|q_attn|c_proj|c_fc)\.weight")


@dataclass(frozen=True)
class Place:
    """Place in the base checkpoint that holds a weight.

    Attributes:
        name: the tensor.
        piece: which part of it.
        shape: shape of that part.
    """

    name: str
    piece: Piece
    shape: Shape


class BaseWeights:
    """Weights of a base checkpoint, by the spellings of their names.

    Attributes:
        index: the checkpoint.
        tied: spellings of embedding and head if they are one weight, wherever it is stored; else empty.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        shapes = {name: info.shape for name, info in index.tensors.items()}
        self._places: dict[str, Place] = {}
        for name, parts in pieces(shapes).items():
            for piece in parts:
                self._places.setdefault(piece.spelling, Place(name, piece, piece.shape_in(shapes[name])))
        self.tied = self._find_tied()

    def find(self, name: str) -> tuple[Place, ...]:
        """Return where weight ``name`` (a spelling) is: two places if it is tied and stored twice, maybe none."""
        names = self.tied if name in self.tied else (name,)
        return tuple(self._places[name] for name in names if name in self._places)

    def experts(self, module: str, part: str) -> list[Place]:
        """Return where ``module.0.part.weight``, ``module.1.part.weight``, ... are; empty if there are none."""
        found: list[Place] = []
        while place := self._places.get(f"{module}.{len(found)}.{part}.weight"):
            found.append(place)
        return found

    def is_conv1d(self, name: str) -> bool:
        """Return whether weight ``name`` is one of GPT-2's, stored [in, out]."""
        match = _CONV1D.fullmatch(name)
        # Query, key and value are one tensor, three times as wide as high; stored [out, in] it would be high.
        attention = self._places.get(f"{match[1]}.attn.c_attn.weight") if match else None
        return attention is not None and len(attention.shape) == 2 and attention.shape[1] > attention.shape[0]

    def _find_tied(self) -> tuple[str, ...]:
        embedding = next((name for name in _EMBEDDINGS if name in self._places), None)
        config = read_config(self.index.path)
        text = config.get("text_config")
        parts = (config, text if isinstance(text, dict) else {})
        by_files = _HEAD not in self._places
        tied = next((part[_TIE] for part in parts if isinstance(part.get(_TIE), bool)), by_files)
        return (embedding, _HEAD) if embedding is not None and tied else ()
