"""From rendered text to token ids, each with a mark that says whether it counts in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fisherkit.prompts.spans import Span, common_length
from fisherkit.prompts.templates import Rendered

_CHARACTERS = 64  # per token; ten times what languages need
_MARGIN = 4096  # characters before the cut whose tokens may come out otherwise: more than the longest token has


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text.

    Attributes:
        ids: token ids.
        counts: for each, whether it counts in the loss; the first never does.
        ends: for each, the character behind its last one; 0 for special tokens, and where the tokenizer does not tell.
    """

    ids: tuple[int, ...]
    counts: tuple[bool, ...]
    ends: tuple[int, ...]

    def counted_bytes(self, text: str, tokenizer: Any) -> int:
        """Return the bytes in UTF-8 of what the tokens that count stand for.

        A token stands for the text from the end of the one before it, the blank between them included. Where the
        tokenizer does not tell, the tokens are made text again.

        Args:
            text: that was tokenised.
            tokenizer: that did it.
        """
        if not any(self.ends):
            kept = [token for token, counts in zip(self.ids, self.counts, strict=True) if counts]
            return len(tokenizer.decode(kept, skip_special_tokens=True).encode())
        total = at = 0
        for end, counts in zip(self.ends, self.counts, strict=True):
            if end > at:
                total += len(text[at:end].encode()) if counts else 0
                at = end
        return total

    def head(self, length: int) -> "Tokens":
        """Return the first so many tokens."""
        return Tokens(self.ids[:length], self.counts[:length], self.ends[:length])


def tokenise(tokenizer: Any, rendered: Rendered, *, everything: bool, longest: int) -> Tokens:
    """Return tokens and, for each, whether it counts: all but the first, or those that overlap a span.

    Text without a template gets the tokenizer's own special tokens, rendered text none; never two BOS.
    A token that straddles the start of a span counts: it carries part of the answer.

    Args:
        tokenizer: of transformers.
        rendered: the text and the spans of characters that count.
        everything: count all tokens instead.
        longest: how many tokens will be used. Of a text that is far longer (a line of 10 MB takes a tokenizer half a
            minute) only the head is tokenised, as long as these tokens lie well before the cut.
    """
    text = rendered.text[: _CHARACTERS * longest + 2 * _MARGIN]
    ids, counts, ends = _tokens(tokenizer, rendered, text, everything)
    last = longest + _doubled_bos(ids, tokenizer.bos_token_id)
    if len(text) < len(rendered.text) and (len(ids) <= last or ends[last] > len(text) - _MARGIN):
        ids, counts, ends = _tokens(tokenizer, rendered, rendered.text, everything)
    counts[:1] = [False] * len(ids[:1])  # nothing predicts the first token
    doubled = _doubled_bos(ids, tokenizer.bos_token_id)
    return Tokens(tuple(ids[doubled:]), (*counts[:1], *counts[doubled + 1 :]), tuple(ends[doubled:]))


def _tokens(
    tokenizer: Any, rendered: Rendered, text: str, everything: bool
) -> tuple[list[int], list[bool], Sequence[int]]:
    """Return ids, counts, and the characters at which tokens end: 0 for all where the tokenizer does not tell."""
    encoded = tokenizer(
        text,
        add_special_tokens=not rendered.templated,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # longer than the model takes is no news here: it is cut afterwards
    )
    ids = list(encoded["input_ids"])
    offsets = encoded["offset_mapping"] if tokenizer.is_fast else [(0, 0)] * len(ids)
    if everything:
        counts = [True] * len(ids)
    elif tokenizer.is_fast:
        counts = [_overlaps(token, rendered.spans or ()) for token in offsets]
    else:
        counts = _counts_by_prefix(tokenizer, rendered, text, ids)
    return ids, counts, [end for _, end in offsets]


def _overlaps(token: Span, spans: Sequence[Span]) -> bool:
    return any(max(token[0], start) < min(token[1], end) for start, end in spans)


def _counts_by_prefix(tokenizer: Any, rendered: Rendered, text: str, ids: list[int]) -> list[bool]:
    """Mark tokens without offsets: a span starts where the text before it stops having the same tokens."""

    def tokens_before(position: int) -> int:
        prefix = tokenizer(text[:position], add_special_tokens=not rendered.templated, verbose=False)
        return common_length(ids, prefix["input_ids"])

    spans = [(tokens_before(start), tokens_before(end)) for start, end in rendered.spans or ()]
    return [any(start <= t < end for start, end in spans) for t in range(len(ids))]


def _doubled_bos(ids: list[int], bos: int | None) -> int:
    """Return how many BOS to drop: a text may bring its own, and a template may render two."""
    leading = next((n for n, token in enumerate(ids) if token != bos), len(ids))
    return max(leading - 1, 0)
