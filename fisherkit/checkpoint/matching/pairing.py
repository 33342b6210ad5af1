"""Pairing of the tensors of BASE and FT, two checkpoints of one model that may be laid out differently.

Shards, prefixes, dtypes and the order of tensors may differ, and experts may be fused on one side and apart on the
other. A tensor of BASE is then put together from *segments* of tensors of FT, each a contiguous run in both. What is
left over on a side falls under a stated rule, or the pair is refused. No torch.

The rules:

- Integer tensors and buffers (rotary frequencies, causal masks, positions) are BASE's; FT's are dropped.
- A part that one side lacks *as a whole* is BASE's where BASE has it and dropped where FT has it: a tower for images
  or sound, layers that predict further tokens, keys and values of blocks that use another block's.
- The output has BASE's layout. A head that FT stores and BASE does not must equal FT's embedding, and is dropped; a
  head that BASE stores and FT ties to its embedding is paired with that.
- Anything else that one side lacks is refused, as are differing shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.checkpoint.matching.links import Segment
from fisherkit.checkpoint.matching.matcher import Matching
from fisherkit.checkpoint.matching.view import Side
from fisherkit.floats import STORED, Stored


@dataclass(frozen=True)
class Pairing:
    """Tensors of two checkpoints, paired by ``pair``.

    Reading is thread-safe; ``reader`` is always an ArrayReader of FT.

    Attributes:
        base: the checkpoint whose names and shapes are used throughout.
        tuned: the other one.
        matched: weights of BASE with a counterpart, in BASE's order.
        base_only: tensors of BASE without one, to be copied as they are, in BASE's order.
        tuned_only: tensors of FT that nothing is made of.
        notes: which rules were applied, one sentence each.
        tied_pairs: of two matched tensors that BASE and FT both tie, the head by the embedding: both are stored in
            BASE, and equal on either side. Whoever treats them differently must untie them in the config.
        untied: BASE stores a head and an embedding that are no such pair, so the output's config must not tie them.
        segments: what each matched tensor is made of, in BASE's memory order.
    """

    base: CheckpointIndex
    tuned: CheckpointIndex
    matched: tuple[str, ...]
    base_only: tuple[str, ...]
    tuned_only: tuple[str, ...]
    notes: tuple[str, ...]
    tied_pairs: Mapping[str, str]
    untied: bool
    segments: Mapping[str, tuple[Segment, ...]]

    def code(self, name: str) -> str:
        """FT's dtype of a matched tensor, as safetensors code."""
        return self.tuned.tensors[self.segments[name][0].source].dtype

    def read(self, name: str, reader: ArrayReader) -> Stored:
        """Read FT's values of a matched tensor in FT's stored dtype, in BASE's shape, as one fresh array.

        Raises:
            CheckpointError: a file is truncated or cannot be read.
        """
        info = self.base.tensors[name]
        out = np.empty(info.numel, STORED[self.code(name)])
        self.read_into(name, reader, out)
        return out.reshape(info.shape)

    def read_into(self, name: str, reader: ArrayReader, out: Stored, start: int = 0) -> None:
        """Fill ``out`` with FT's elements of a matched tensor from ``start`` on, in BASE's memory order.

        Args:
            name: the tensor, as BASE calls it.
            reader: of FT.
            out: [n] of FT's stored type.
            start: first element.

        Raises:
            CheckpointError: a file is truncated or cannot be read.
            IndexError: the tensor has no such elements, or they are of another type than ``out``.
        """
        stop = start + out.size
        if start < 0 or stop > self.base.tensors[name].numel:
            raise IndexError(f"elements {start} to {stop} of {name!r}")
        for segment in self.segments[name]:
            first, last = max(start, segment.start), min(stop, segment.start + segment.size)
            if first < last:
                part = out[first - start : last - start]
                reader.read_into(segment.source, part, segment.source_start + first - segment.start)

    def prefetch(self, name: str, reader: ArrayReader) -> None:
        """Have the system read ahead what a matched tensor is made of."""
        for source in dict.fromkeys(segment.source for segment in self.segments[name]):
            reader.prefetch(source)


def pair(base: CheckpointIndex, tuned: CheckpointIndex, *, base_folder: Path, tuned_folder: Path) -> Pairing:
    """Match the tensors of two checkpoints of one model; see the rules above.

    Reads headers and configs only, and an embedding and a head where a rule asks whether they are equal.

    Args:
        base: the checkpoint that gives names, shapes and layout.
        tuned: a fine-tune of it.
        base_folder: folder or file of BASE, for its config.json; there may be none.
        tuned_folder: the same for FT.

    Raises:
        CheckpointError: not two checkpoints of one model, quantised, of different vocabularies, or with a tensor left
            over that no rule covers.
    """
    found = Matching(Side.of(base, base_folder), Side.of(tuned, tuned_folder))
    found.match()
    found.pair_head()
    found.set_aside()
    sources = {segment.source for made_of in found.segments.values() for segment in made_of}
    return Pairing(
        base=base,
        tuned=tuned,
        matched=tuple(name for name in base.tensors if name in found.segments),
        base_only=tuple(name for name in base.tensors if name not in found.segments),
        tuned_only=tuple(name for name in tuned.tensors if name not in sources),
        notes=tuple(found.notes),
        tied_pairs=found.tied_pairs,
        untied=found.untied,
        segments=found.segments,
    )
