"""Rules by which two checkpoints are paired, step by step, as ``pairing`` states them. No torch."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fisherkit.checkpoint.matching.links import Link, Segment, links, spelled
from fisherkit.checkpoint.matching.view import Side, is_vocabulary, same_values
from fisherkit.checkpoint.names.spelling import Piece
from fisherkit.errors import CheckpointError, some_names


@dataclass
class Matching:
    """A pairing in the making; call ``match``, ``pair_head`` and ``set_aside`` in this order.

    Attributes:
        base: the side that gives names and shapes.
        tuned: the other side.
        segments: what each matched tensor of BASE is made of.
        missing: weights of BASE that are not matched.
        extra: weights of FT of which nothing, or not all, is used.
        notes, tied_pairs, untied: as in Pairing.
    """

    base: Side
    tuned: Side
    segments: dict[str, tuple[Segment, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tied_pairs: dict[str, str] = field(default_factory=dict)
    untied: bool = False

    def match(self) -> None:
        """Pair by spelling: whole tensors where both sides have one, experts by their pieces otherwise.

        Raises:
            CheckpointError: shapes differ, or nothing pairs at all.
        """
        linked = links(self.base, self.tuned)
        self._refuse_shapes(linked)
        used: Counter[str] = Counter()
        for name, found in linked.items():
            self.segments[name] = self._segments(name, found)
            for segment in self.segments[name]:
                used[segment.source] += segment.size
        self.missing = [name for name in self.base.weights if name not in linked]
        self.extra = [name for name, shape in self.tuned.weights.items() if used[name] < math.prod(shape)]
        self._note_experts()

    def pair_head(self) -> None:
        """Bring a head that one side ties and the other stores under the rules.

        Raises:
            CheckpointError: head and embedding have diverged, or FT has no head.
        """
        head = self.base.head
        if self.tuned.head in self.extra and self.base.ties is not False:
            self._drop_head(self.tuned.head)
        elif head in self.missing:
            self._take_embedding_for(head)
        embedding = self.base.embedding
        if head in self.segments and embedding in self.segments:
            self._find_tied_pair(head, embedding)

    def set_aside(self) -> None:
        """Take out what a rule lets one side lack, and note it.

        Raises:
            CheckpointError: something is left that no rule covers.
        """
        self.missing = self._take_out(self.missing, self.base, self.tuned, "FT has no {}; kept from BASE: {}")
        self.extra = self._take_out(self.extra, self.tuned, self.base, "BASE has no {}; dropped from FT: {}")
        self._note_constants()
        if self.missing or self.extra:
            lacks = [f"lacks {_count(self.missing)} of BASE ({some_names(self.missing)})"] if self.missing else []
            has = [f"has {len(self.extra)} that BASE lacks ({some_names(self.extra)})"] if self.extra else []
            advice = f"BASE, {self.base.index.path}, must be the model that it was tuned from"
            if any(".lora_" in name for name in self.extra):
                advice = "its LoRA factors are not merged; merge_and_unload() it and save that"
            raise CheckpointError(f"{self.tuned.index.path}: {' and '.join(lacks + has)}; {advice}")

    def _refuse_shapes(self, linked: Mapping[str, Sequence[Link]]) -> None:
        differing = [text for name, found in linked.items() if (text := self._difference(name, found))]
        base, tuned = self.base.index.path, self.tuned.index.path
        if not linked or len(differing) > len(linked) / 2:
            agree = f"{len(linked) - len(differing)} of {len(self.base.weights)} tensors agree in name and shape"
            first = f", and {differing[0]}" if differing else ""
            raise CheckpointError(f"{base} and {tuned} are two different models: {agree}{first}")
        if differing:
            raise CheckpointError(f"{tuned}: not shaped like {base}: {some_names(differing)}")

    def _difference(self, name: str, links: Sequence[Link]) -> str | None:
        """Describe how the shapes of a tensor's pieces differ; None if they agree."""
        for link in links:
            ours = link.ours.shape_in(self.base.weights[name])
            theirs = link.theirs.shape_in(self.tuned.weights[link.source])
            if ours == theirs:
                continue
            if is_vocabulary(name) and ours[1:] == theirs[1:]:
                smaller = "BASE" if ours[0] < theirs[0] else "FT"
                resize = f"resize {smaller} first, with model.resize_token_embeddings({max(ours[0], theirs[0])})"
                return f"vocabulary: {name} has {ours[0]} rows in BASE, {theirs[0]} in FT ({resize})"
            return f"{name} is {list(ours)} in BASE, {list(theirs)} in FT"
        return None

    def _segments(self, name: str, links: Sequence[Link]) -> tuple[Segment, ...]:
        codes = {self.tuned.index.tensors[link.source].dtype for link in links}
        if len(codes) > 1:
            mixed = ", ".join(sorted(codes))
            raise CheckpointError(f"{self.tuned.index.path}: the experts of {name} are of several types ({mixed})")
        found = []
        for link in links:
            start, size = link.ours.span(self.base.weights[name])
            found.append(Segment(start, link.source, link.theirs.span(self.tuned.weights[link.source])[0], size))
        return tuple(found)

    def _drop_head(self, head: str) -> None:
        if not self.tuned.same_ends():
            raise CheckpointError(
                f"{self.tuned.index.path}: {head} has diverged from the embedding, and {self.base.index.path} ties the "
                "two; save BASE with a head of its own (model.lm_head.weight = "
                "torch.nn.Parameter(model.lm_head.weight.clone()), model.config.tie_word_embeddings = False)"
            )
        self.extra.remove(head)
        self.notes.append(f"FT's {head} equals its embedding and is dropped: BASE ties the two")

    def _take_embedding_for(self, head: str) -> None:
        tied = self.base.same_ends() if self.tuned.ties is None else self.tuned.ties
        source = self.tuned.embedding
        if not tied or source is None:
            raise CheckpointError(
                f"{self.tuned.index.path}: has no {head}, and its config does not tie it to the embedding; "
                "save the tuned model with its head"
            )
        whole = Piece(head, None, 0, 0)
        if difference := self._difference(head, [Link(whole, source, whole)]):
            raise CheckpointError(f"{self.tuned.index.path}: its embedding is its head, but {difference}")
        self.missing.remove(head)
        self.segments[head] = (Segment(0, source, 0, math.prod(self.base.weights[head])),)
        self.notes.append(f"FT ties its head to its embedding: BASE's {head} is compared with FT's {source}")

    def _find_tied_pair(self, head: str, embedding: str) -> None:
        ours, theirs = self.base, self.tuned
        sources = [self.segments[name][0].source for name in (head, embedding)]
        tied = ours.ties is not False and ours.same_ends()
        if tied or theirs.ties:
            same = sources[0] == sources[1] or same_values(theirs.index, *sources)
            if theirs.ties and not same:
                raise CheckpointError(
                    f"{theirs.index.path}: its config ties {sources[0]} to {sources[1]}, but they have diverged; "
                    "set tie_word_embeddings to false there if both were trained, or save it again"
                )
            tied = tied and same
        self.untied = not tied
        if tied:
            self.tied_pairs[head] = embedding

    def _take_out(self, names: Sequence[str], side: Side, other: Side, note: str) -> list[str]:
        """Names that remain without the parts that the other side may lack."""
        parts: dict[str | None, list[str]] = defaultdict(list)
        for name in names:
            parts[side.spare_part(name, other)].append(name)
        rest = parts.pop(None, [])
        self.notes += [note.format(part, _count(found)) for part, found in parts.items()]
        return rest

    def _note_experts(self) -> None:
        apart = [
            name
            for name, found in self.segments.items()
            if any(part.size < math.prod(self.tuned.weights[part.source]) for part in found) or len(found) > 1
        ]
        if apart:
            self.notes.append(f"FT stores its experts in another way: {_count(apart)} of BASE are put together from it")

    def _note_constants(self) -> None:
        ours, theirs = (_constants(side) for side in (self.base, self.tuned))
        if kept := [name for spelled, name in ours.items() if spelled not in theirs]:
            self.notes.append(f"integers and constants that only BASE stores are kept: {some_names(kept)}")
        if dropped := [name for spelled, name in theirs.items() if spelled not in ours]:
            self.notes.append(f"integers and constants that only FT stores are dropped: {some_names(dropped)}")


def _constants(side: Side) -> dict[str, str]:
    return {spelled(name): name for name in side.index.tensors if name not in side.weights}


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
