"""From rendered text to token ids, each with a mark that says whether it counts in the loss."""

from collections.abc import Sequence
from typing import Any

from fisherkit.prompts.templates import Rendered, Span, common_length


def tokenise(tokenizer: Any, rendered: Rendered, *, everything: bool) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids and, for each, whether it overlaps a span (``everything``: all but the first count).

    Text without a template gets the tokenizer's own special tokens, rendered text none; never two BOS.
    A token that straddles the start of a span counts: it carries part of the answer.
    """
    encoded = tokenizer(
        rendered.text,
        add_special_tokens=not rendered.templated,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # longer than the model takes is no news here: it is cut afterwards
    )
    ids = list(encoded["input_ids"])
    if everything:
        counts = [True] * len(ids)
    elif tokenizer.is_fast:
        counts = [_overlaps(token, rendered.spans or ()) for token in encoded["offset_mapping"]]
    else:
        counts = _counts_by_prefix(tokenizer, rendered, ids)
    counts[:1] = [False] * len(ids[:1])  # nothing predicts the first token
    doubled = _doubled_bos(ids, tokenizer.bos_token_id)
    return tuple(ids[doubled:]), (*counts[:1], *counts[doubled + 1 :])


def _overlaps(token: Span, spans: Sequence[Span]) -> bool:
    return any(max(token[0], start) < min(token[1], end) for start, end in spans)


def _counts_by_prefix(tokenizer: Any, rendered: Rendered, ids: list[int]) -> list[bool]:
    """For tokenizers without offsets: a span starts where the text before it stops having the same tokens."""

    def tokens_before(position: int) -> int:
        prefix = tokenizer(rendered.text[:position], add_special_tokens=not rendered.templated, verbose=False)
        return common_length(ids, prefix["input_ids"])

    spans = [(tokens_before(start), tokens_before(end)) for start, end in rendered.spans or ()]
    return [any(start <= t < end for start, end in spans) for t in range(len(ids))]


def _doubled_bos(ids: list[int], bos: int | None) -> int:
    """How many BOS to drop: a text may bring its own, and a template may render two."""
    leading = next((n for n, token in enumerate(ids) if token != bos), len(ids))
    return max(leading - 1, 0)
