"""Probe before a long run: what follows a token must not change what the model makes of it.

Everything rests on this. The loss of a token is taken from the logits before it, which must not have seen it; and
samples that are padded on the right to share a batch must not see their padding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fisherkit.engine.model.findings import AttendsAhead, NeedsBatchSizeOne
from fisherkit.engine.sweep.feed import Feed, Inputs

PROBE_TOKENS = 16
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01}
COARSE_TOLERANCE = 0.03  # bfloat16: products of other shapes round otherwise


def probe_inputs(feed: Feed, ids: list[int]) -> Inputs:
    """Return the forward's arguments for one sequence of tokens, all but the first of which count in a loss."""
    return feed.arguments(torch.tensor([ids], device=feed.device), [1])


def check_causality(feed: Feed, logits: Callable[[Inputs], Tensor]) -> None:
    """Run the start of a sample alone and before two different continuations, and compare its logits.

    Args:
        feed: the model and its samples.
        logits: forward of the model, or of its first blocks: arguments -> [1, T, V].

    Raises:
        AttendsAhead: the continuation's tokens matter.
        NeedsBatchSizeOne: only its length matters.
    """
    start, one, other = _sequences(feed)
    if not one:
        return
    with torch.no_grad():
        alone = logits(probe_inputs(feed, start))[0]
        longer, changed = (logits(probe_inputs(feed, [*start, *more]))[0, : len(start)] for more in (one, other))
    if not is_close(feed, longer, changed):
        raise AttendsAhead
    if any(len(batch) > 1 for batch in feed.batches) and not is_close(feed, longer, alone):
        raise NeedsBatchSizeOne(frozenset())


def _sequences(feed: Feed) -> tuple[list[int], list[int], list[int]]:
    """Return the start of the shortest sample, and two continuations that differ at every place."""
    shortest = min(feed.samples, key=lambda sample: len(sample.ids))
    tokens = sorted({token for sample in feed.samples for token in sample.ids})
    longest = max(len(sample.ids) for sample in feed.samples)
    start = list(shortest.ids[: max(2, min(PROBE_TOKENS, longest // 2))])
    more = min(PROBE_TOKENS, longest - len(start))  # never beyond the positions that the run itself needs
    if len(tokens) < 2 or more < 1:
        return start, [], []
    one = [tokens[number % len(tokens)] for number in range(more)]
    return start, one, [tokens[(number + 1) % len(tokens)] for number in range(more)]


def is_close(feed: Feed, found: Tensor, wanted: Tensor) -> bool:
    """Return whether two logits differ by no more than the rounding of the model's dtype, taken together."""
    tolerance = TOLERANCE.get(feed.skeleton.dtype, COARSE_TOLERANCE)
    found, wanted = found.float(), wanted.float()
    if not wanted.isfinite().all():
        return True  # an overflow is the loss's to report, with the row
    return bool((found - wanted).norm() <= tolerance * wanted.norm())
