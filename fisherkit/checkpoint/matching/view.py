"""One side of a pair of checkpoints: which of its tensors are weights, and which of those its model can do without.

No torch. Knows one checkpoint and its config at a time; what to make of two is for ``pairing``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.folder.quantised import refuse_quantised
from fisherkit.checkpoint.folder.side_files import read_config
from fisherkit.checkpoint.headers import TensorInfo
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.checkpoint.names.location import block_prefix, locate, tower
from fisherkit.checkpoint.names.spelling import Piece, Shape, pieces, spelling
from fisherkit.floats import FLOATING, STORED, widen

_BLOCK_ELEMENTS = 1 << 20

# Constants that some versions of a model store and others compute: rotary frequencies, positions, causal masks.
_BUFFER = re.compile(r"(?:^|\.)(?:(?:\w+_)?inv_freq|(?:cos|sin)_cached|position_ids|masked_bias)$")
_CAUSAL_MASK = re.compile(r"(?:^|\.)(?:attn|attention)\.bias$")  # [1, 1, T, T]; a bias of weights is a vector
_HEADS = ("lm_head.weight", "embed_out.weight")  # the latter is GPT-NeoX's on disk
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_SHARED_KEYS = re.compile(r"self_attn\.[kv]_(?:proj|norm)")


@dataclass(frozen=True)
class Side:
    """A checkpoint and its config.

    Attributes:
        index: the checkpoint.
        config: its config.json; empty where there is none.
    """

    index: CheckpointIndex
    config: Mapping[str, Any]

    @classmethod
    def of(cls, index: CheckpointIndex, folder: Path) -> Self:
        """Read the config in ``folder``; raises CheckpointError if the checkpoint is quantised."""
        config = read_config(folder)
        refuse_quantised(index, config)
        return cls(index, config)

    @cached_property
    def weights(self) -> dict[str, Shape]:
        """Shapes of the floating tensors that are no buffers, by name."""
        return {name: info.shape for name, info in self.index.tensors.items() if is_weight(info)}

    @cached_property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Pieces of the weights, by name."""
        return pieces(self.weights)

    @cached_property
    def towers(self) -> frozenset[str]:
        """Parts beside the text model that weights are stored of."""
        return frozenset(part for name in self.weights if (part := tower(spelling(name))))

    @cached_property
    def head(self) -> str | None:
        """Name of the matrix from hidden states to tokens, where it is stored."""
        return next((name for name in self.weights if name.endswith(_HEADS) and spelling(name) in _HEADS), None)

    @cached_property
    def embedding(self) -> str | None:
        """Name of the matrix from tokens to hidden states."""
        found = (name for name in self.weights if _EMBEDDING.search(name) and not tower(spelling(name)))
        return next(found, None)

    @property
    def ties(self) -> bool | None:
        """True if the config says that head and embedding are one; None where it says nothing."""
        for part in (self.config, self._text_config):
            if isinstance(part.get("tie_word_embeddings"), bool):
                return bool(part["tie_word_embeddings"])
        return None

    def same_ends(self) -> bool:
        """Return whether head and embedding, both stored, hold the same values; read until they differ."""
        assert self.head is not None
        return self.embedding is not None and same_values(self.index, self.head, self.embedding)

    def spare_part(self, name: str, other: "Side") -> str | None:
        """Return the part a weight belongs to that the other side may lack as a whole; None where it may not.

        Parts are towers for images and sound, layers that predict further tokens (``mtp``, or blocks after the last of
        the config), and keys and values of blocks that use another block's.

        Args:
            name: the weight.
            other: the checkpoint that may lack it.
        """
        part = tower(spelling(name))
        if part is not None:
            return part if part not in other.towers else None
        place = locate(name, self._blocks)
        depth = self._text_config.get("num_hidden_layers", self._text_config.get("n_layer"))
        if place.layer is None or not isinstance(depth, int):
            return None
        if place.layer >= depth:
            return place.layer_name
        shared = self._text_config.get("num_kv_shared_layers")
        shared = shared if isinstance(shared, int) else 0
        return "unused key or value" if place.layer >= depth - shared and _SHARED_KEYS.match(place.module) else None

    @cached_property
    def _text_config(self) -> Mapping[str, Any]:
        text = self.config.get("text_config")
        return text if isinstance(text, Mapping) else self.config

    @cached_property
    def _blocks(self) -> str | None:
        return block_prefix(self.weights)


def is_weight(info: TensorInfo) -> bool:
    """Return whether a tensor is trained: floating, and no constant that the model could compute itself."""
    is_mask = len(info.shape) == 4 and _CAUSAL_MASK.search(info.name)
    return info.dtype in FLOATING and not is_mask and not _BUFFER.search(info.name)


def is_vocabulary(name: str) -> bool:
    """Return whether a tensor has one row per token: an embedding or a head."""
    return spelling(name) in _HEADS or bool(_EMBEDDING.search(name))


def same_values(index: CheckpointIndex, one: str, other: str) -> bool:
    """Return whether two tensors of a checkpoint are equal in shape and, bit by bit as float32, in values.

    Args:
        index: the checkpoint.
        one: name of a floating tensor.
        other: name of another.

    Raises:
        CheckpointError: they cannot be read.
    """
    a, b = index.tensors[one], index.tensors[other]
    if a.shape != b.shape:
        return False
    with ArrayReader(index) as reader:
        for start in range(0, a.numel, _BLOCK_ELEMENTS):
            stop = min(start + _BLOCK_ELEMENTS, a.numel)
            if not np.array_equal(_bits(reader, a, start, stop), _bits(reader, b, start, stop)):
                return False
    return True


def _bits(reader: ArrayReader, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint32]:
    block = np.empty(stop - start, STORED[info.dtype])
    reader.read_into(info.name, block, start)
    return widen(block, info.dtype).view(np.uint32)
