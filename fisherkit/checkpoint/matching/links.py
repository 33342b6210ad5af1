"""Counterparts by name: which piece of BASE is which of FT, whatever either calls it. No torch.

Whole tensors come first; experts that are fused on one side only meet by their pieces. Knows names and shapes, and no
rules: what has no counterpart is not here.
"""

import re
from typing import NamedTuple

from fisherkit.checkpoint.matching.view import Side
from fisherkit.checkpoint.names.spelling import Piece, spelling
from fisherkit.errors import CheckpointError


class Segment(NamedTuple):
    """A run of elements of a tensor of BASE, and the run of a tensor of FT that corresponds to it.

    Attributes:
        start: first element in BASE's flat tensor.
        source: tensor of FT.
        source_start: first element in that tensor, flat.
        size: number of elements.
    """

    start: int
    source: str
    source_start: int
    size: int


class Link(NamedTuple):
    """A piece of a tensor of BASE, and the piece of a tensor of FT that means the same."""

    ours: Piece
    source: str
    theirs: Piece


def links(base: Side, tuned: Side) -> dict[str, list[Link]]:
    """Return the counterparts of BASE's tensors piece by piece, for tensors all of whose pieces have one.

    Args:
        base: gives names.
        tuned: is searched.
    """
    _places(base)  # refuses names that mean the same tensor
    theirs = _places(tuned)
    wholes = {spelled(name): name for name in tuned.weights}
    found: dict[str, list[Link]] = {}
    for name, parts in base.pieces.items():
        source = wholes.get(spelled(name))
        if source is not None:
            whole = Piece(name, None, 0, 0)
            found[name] = [Link(whole, source, whole)]
        elif all(piece.spelling in theirs for piece in parts):
            found[name] = [Link(piece, *theirs[piece.spelling]) for piece in parts]
    return found


def _places(side: Side) -> dict[str, tuple[str, Piece]]:
    """Place of each piece, by its spelling; raises CheckpointError if there are two of one spelling."""
    places: dict[str, tuple[str, Piece]] = {}
    for name, parts in side.pieces.items():
        for piece in parts:
            if piece.spelling in places:
                other = places[piece.spelling][0]
                raise CheckpointError(f"{side.index.path}: {other} and {name} are two names of one tensor; remove one")
            places[piece.spelling] = (name, piece)
    return places


def spelled(name: str) -> str:
    """Return the spelling of a name (see names.spelling), and GPT-NeoX's head under the name that it has in memory."""
    return re.sub(r"^embed_out\.", "lm_head.", spelling(name))
