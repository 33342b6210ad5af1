"""From the keys of an adapter file to the updates of the base's tensors: what goes where, with every shape checked.

Reads no tensor but those that must be equal to fit tied embeddings. Axes as in fisherkit.checkpoint.lora.updates.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fisherkit.checkpoint.lora.base_weights import BaseWeights, Place
from fisherkit.checkpoint.lora.config import AdapterConfig, merge_first
from fisherkit.checkpoint.lora.consistency import refuse_missing_tokens, unused_settings
from fisherkit.checkpoint.lora.keys import Key, Role
from fisherkit.checkpoint.lora.updates import Factors, LowRank, Rows, Update, Whole
from fisherkit.checkpoint.names.spelling import Piece, Shape, pieces, spelling
from fisherkit.errors import CheckpointError
from fisherkit.floats import FLOATING

# Parameters of fused experts, in the order in which models declare them: peft nests the first innermost.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_WRONG_MODEL = "is it the adapter of another model?"

Group = Mapping[Role, str]
"""The keys of one pair of factors, and of their magnitudes."""


class AdapterPlan:
    """Updates that an adapter makes, worked out on construction.

    Attributes:
        updates: by name of the base's tensor; copies of the base come before what is added to them.
        ranks: inner sizes of all pairs of factors.
        notes: what the reader of a report should know, one sentence each.
    """

    def __init__(self, keys: Sequence[Key], config: AdapterConfig, base: BaseWeights, factors: Factors) -> None:
        self.updates: dict[str, list[Update]] = {}
        self.ranks: set[int] = set()
        self.notes: list[str] = []
        self._config = config
        self._base = base
        self._factors = factors
        self._file = factors.reader.index.path
        self._changed: dict[tuple[str, Piece], str] = {}  # by which key; copies of the base do not count
        self._copies = {key.text for key in keys if key.role == "copy"}
        self._adapted: dict[str, None] = {}  # names of what has factors
        refuse_missing_tokens(keys, config, base)
        self._add_tensors([key for key in keys if key.role in {"copy", "whole"}])
        for key in keys:
            if key.role == "tokens":
                self._add_rows(key)
        for module, nested in _by_module(keys).items():
            self._add_module(module, nested)
        self._refuse_unused(keys)
        self.notes += unused_settings(keys, self._adapted, config, base)

    # Tensors that replace others

    def _add_tensors(self, keys: Sequence[Key]) -> None:
        keys = self._untorn(keys)
        parts = pieces({key.module: self._shape(key.text) for key in keys})
        for key in keys:
            copied = key.role == "copy" or not self._config.is_saved(key.module)
            for source in parts[key.module]:
                for place in self._base.find(source.spelling):
                    self._check(key.text, source.shape_in(self._shape(key.text)), place)
                    self._put(place, Whole(piece=place.piece, key=key.text, source=source, copied=copied))

    def _untorn(self, keys: Sequence[Key]) -> Sequence[Key]:
        """Without the second of two equal tensors for tied embeddings; different ones have no place in the base."""
        torn = [key for key in keys if key.role == "whole" and spelling(key.module) in self._base.tied]
        if len(torn) < 2 and not any(self._config.is_saved(key.module) for key in torn):
            return keys  # a copy, which saving put there
        torn.sort(key=lambda key: not self._config.is_saved(key.module))
        stored = [self._factors.stored(key.text) for key in torn]
        if len(torn) == 1 or not all(np.array_equal(stored[0], other) for other in stored[1:]):
            raise CheckpointError(
                f"{self._file}: {torn[0].text!r} makes embedding and head differ, which are one weight in "
                f"{self._base.index.path}; {merge_first(self._file.parent)}"
            )
        return [key for key in keys if key not in torn[1:]]

    def _add_rows(self, key: Key) -> None:
        rows, shape = self._config.tokens_of(key.module), self._shape(key.text)
        if rows is None or shape[:1] != (len(rows),):
            raise CheckpointError(
                f"{self._config.path}: names {len(rows or ())} trainable tokens of {key.module!r}, and {key.text!r} "
                f"has {shape[0] if shape else 'no rows'}; fetch the adapter again"
            )
        for place in self._base.find(spelling(f"{key.module}.weight")):
            self._check(key.text, (place.shape[0], *shape[1:]), place)
            outside = [row for row in rows if not 0 <= row < place.shape[0]]
            if outside:
                raise CheckpointError(
                    f"{self._config.path}: trains token {outside[0]}, and {place.name!r} in "
                    f"{self._base.index.path} has {place.shape[0]}; {_WRONG_MODEL}"
                )
            self._put(place, Rows(piece=place.piece, key=key.text, rows=rows))

    # Low-rank factors

    def _add_module(self, module: str, nested: Mapping[int, Group]) -> None:
        """Add the factors of one module: one pair, or one for each of its parameters, the first declared innermost."""
        leaves = [leaf for leaf in self._config.parameters_of(module) if self._has(module, leaf)]
        leaves.sort(key=lambda leaf: list(_PARTS).index(leaf) if leaf in _PARTS else len(_PARTS))
        if not leaves and list(nested) == [0]:
            self._add_matrix(module, f"{module}.weight", nested[0])
        elif len(leaves) == len(nested):
            for leaf, depth in zip(leaves, sorted(nested, reverse=True), strict=True):
                self._add_parameter(module, leaf, nested[depth])

    def _has(self, module: str, leaf: str) -> bool:
        counts = {len(self._base.experts(spelling(module), part)) for part in _PARTS.get(leaf, ())}
        return bool(self._base.find(spelling(f"{module}.{leaf}"))) or (len(counts) == 1 and counts != {0})

    def _add_parameter(self, module: str, leaf: str, group: Group) -> None:
        own = f"{module}.{leaf}"
        whole = self._base.find(spelling(own))
        if not whole:
            self._add_experts(own, [self._base.experts(spelling(module), part) for part in _PARTS[leaf]], group)
        elif len(whole[0].shape) == 3:
            self._add_experts(own, [_slices(whole[0])], group)
        else:
            self._add_matrix(own, own, group)

    def _add_matrix(self, own: str, name: str, group: Group) -> None:
        a, b, embedding = self._pair(own, group)
        name = spelling(name)
        flipped = embedding or self._base.is_conv1d(name)
        for place in self._base.find(name):
            if self._config.fan_in_fan_out and not flipped and len(place.shape) == 2 and len(set(place.shape)) == 1:
                raise CheckpointError(
                    f"{self._config.path}: says fan_in_fan_out, and which way {place.name!r} lies cannot be told; "
                    f"{merge_first(self._file.parent)}"
                )
            made = self._low_rank(own, group, place, experts=1, flipped=flipped)
            self._check(b, _made(self._shape(a), self._shape(b), flipped), place)
            self._put(place, made)
        if name in self._base.tied:
            self.notes.append(
                f"embedding and head are one weight in {self._base.index.path}: what the adapter does to {own} "
                "is done to both, as peft merges it"
            )

    def _add_experts(self, own: str, parts: Sequence[Sequence[Place]], group: Group) -> None:
        """Factors that all experts share. ``parts`` are the regions of the experts' matrices, from the top down."""
        a, b, _ = self._pair(own, group)
        first, experts = parts[0][0], len(parts[0])
        wanted = Place(first.name, first.piece, (sum(part[0].shape[0] for part in parts), first.shape[1]))
        shapes = self._shape(a), self._shape(b)
        either = (_made(*shapes, flipped=False) == wanted.shape, _made(*shapes, flipped=True) == wanted.shape)
        # Where both ways fit: experts that lie [E, in, out] are those that names.spelling could not cut into pieces.
        input_first = self._config.input_first or first.piece.spelling == spelling(own)
        flipped = input_first if all(either) else either[1]
        self._check(b, _made(*shapes, flipped), wanted)
        start = 0
        for part in parts:
            for expert, place in enumerate(part):
                made = self._low_rank(own, group, place, experts=experts, flipped=flipped, expert=expert, start=start)
                self._put(place, made)
            start += part[0].shape[0]

    def _low_rank(
        self, own: str, group: Group, place: Place, *, experts: int, flipped: bool, expert: int = 0, start: int = 0
    ) -> LowRank:
        a, b, _ = self._pair(own, group)
        rank, rest = divmod(self._shape(a)[0], experts)
        expected = self._config.rank_of(own)
        if experts == 1 and rank != expected:
            raise CheckpointError(
                f"{self._config.path}: says rank {expected:g} for {own!r}, and {a!r} in {self._file.name} has {rank}; "
                "fetch the adapter again"
            )
        if rest or not rank or rank != expected:
            raise CheckpointError(
                f"{self._file}: {a!r} has {self._shape(a)[0]} rows, which are not {expected:g} for each of the "
                f"{experts} experts in {self._base.index.path}; {_WRONG_MODEL}"
            )
        self.ranks.add(rank)
        self._adapted[own] = None
        return LowRank(
            piece=place.piece,
            a=a,
            b=b,
            scale=self._config.scale(own, rank),
            flipped=flipped,
            start=start,
            stop=start + place.shape[0],
            expert=expert,
            experts=experts,
            magnitude=group.get("magnitude"),
        )

    def _pair(self, own: str, group: Group) -> tuple[str, str, bool]:
        """Keys of A and B, and whether they are those of an embedding."""
        embedding = "embedding_A" in group
        a, b = (group.get("embedding_A"), group.get("embedding_B")) if embedding else (group.get("A"), group.get("B"))
        if a is None or b is None:
            raise CheckpointError(f"{self._file}: {own!r} has one of its two factors only; fetch the adapter again")
        shapes = self._shape(a), self._shape(b)
        if len(shapes[0]) != 2 or len(shapes[1]) != 2:
            raise CheckpointError(f"{self._file}: {a!r} is no matrix; {merge_first(self._file.parent)}")
        if shapes[0][0] != shapes[1][1]:
            raise CheckpointError(
                f"{self._file}: {a!r} is {list(shapes[0])} and {b!r} {list(shapes[1])}, which have no product; "
                "fetch the adapter again"
            )
        magnitude = group.get("magnitude")
        if (magnitude is not None) != self._config.dora or (magnitude and self._shape(magnitude) != shapes[1][:1]):
            raise CheckpointError(
                f"{self._config.path}: use_dora is {str(self._config.dora).lower()}, which the magnitudes of {own!r} "
                f"in {self._file.name} do not fit; fetch the adapter again"
            )
        return a, b, embedding

    # Checks

    def _shape(self, key: str) -> Shape:
        return self._factors.reader.info(key).shape

    def _check(self, key: str, made: Shape, place: Place) -> None:
        if made != place.shape:
            raise CheckpointError(
                f"{self._file}: {key!r} is for a weight of shape {list(made)}, and {place.name!r} in "
                f"{self._base.index.path} has {list(place.shape)}; {_WRONG_MODEL}"
            )

    def _put(self, place: Place, update: Update) -> None:
        code = self._base.index.tensors[place.name].dtype
        if code not in FLOATING:
            raise CheckpointError(
                f"{self._base.index.path}: {place.name!r} is stored as {code}, so nothing can be added to it; "
                "give the checkpoint that it was quantised from"
            )
        key, region = update.keys[0], (place.name, update.piece)
        other = self._changed.setdefault(region, key) if key not in self._copies else key
        if other != key:
            raise CheckpointError(
                f"{self._file}: {other!r} and {key!r} both change {place.name!r}; {merge_first(self._file.parent)}"
            )
        self.updates.setdefault(place.name, []).append(update)

    def _refuse_unused(self, keys: Sequence[Key]) -> None:
        used = {key for updates in self.updates.values() for update in updates for key in update.keys}
        lost = [key.text for key in keys if key.text not in used]
        # Of two equal tensors for one tied weight, one is used.
        lost = [text for text in lost if spelling(text) not in self._base.tied]
        if lost:
            raise CheckpointError(
                f"{self._file}: {len(lost)} of {len(keys)} tensors match no weight of {self._base.index.path}, "
                f"the first {lost[0]!r}; {_WRONG_MODEL}"
            )


def _by_module(keys: Sequence[Key]) -> dict[str, dict[int, dict[Role, str]]]:
    """Keys of factors and magnitudes: by module, then by depth."""
    found: dict[str, dict[int, dict[Role, str]]] = {}
    for key in keys:
        if key.role in {"A", "B", "embedding_A", "embedding_B", "magnitude"}:
            found.setdefault(key.module, {}).setdefault(key.depth, {})[key.role] = key.text
    return found


def _slices(stack: Place) -> list[Place]:
    """Matrices of a tensor of fused experts that is one piece."""
    experts, rows, columns = stack.shape
    name = stack.piece.spelling
    return [Place(stack.name, Piece(name, expert, 0, rows), (rows, columns)) for expert in range(experts)]


def _made(a: Shape, b: Shape, flipped: bool) -> Shape:
    """Shape of the product of factors."""
    return (a[-1], b[0]) if flipped else (b[0], a[-1])
