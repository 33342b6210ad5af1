"""Self-check before a forward sweep: replayed blocks must give the logits that the model's own forward gives.

One short sample goes both ways through the model cut down to its first group of blocks, as engine.sweep.selfcheck has
it; here no gradient is taken.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherkit.engine.model.findings import NeedsBatchSizeOne, Unreplayable
from fisherkit.engine.sweep.blocks import Boundary, run_blocks
from fisherkit.engine.sweep.causality import PROBE_TOKENS, check_causality, is_close, probe_inputs
from fisherkit.engine.sweep.feed import Feed, Inputs
from fisherkit.engine.sweep.last_rows import head_of_rows
from fisherkit.engine.sweep.recorder import BlockCallRecorder
from fisherkit.errors import first_line


@torch.no_grad()
def check_forward(feed: Feed, recorder: BlockCallRecorder, blocks: Sequence[int]) -> None:
    """Compare the ways through ``blocks``, which hold their weights, as the outer modules do.

    Raises:
        Unreplayable: the two ways differ, or these blocks cannot be run alone.
        NeedsBatchSizeOne: samples of one batch, or their padding, matter to each other.
        AttendsAhead: later tokens matter.
    """
    shortest = min(feed.samples, key=lambda sample: len(sample.ids))
    try:
        _compare(feed, recorder, blocks, list(shortest.ids[:PROBE_TOKENS]))
        check_causality(feed, lambda inputs: recorder.logits(inputs, real=blocks))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise Unreplayable(f"its blocks do not run alone ({type(error).__name__}: {first_line(error)})") from error


def _compare(feed: Feed, recorder: BlockCallRecorder, blocks: Sequence[int], ids: list[int]) -> None:
    inputs = probe_inputs(feed, ids)
    plain = recorder.logits(inputs, real=blocks)[0]
    hidden = _replay(feed, recorder, blocks, inputs)
    several = any(len(batch) > 1 for batch in feed.batches)
    if hidden.ndim != 3 or hidden.shape[:2] != (1, len(ids)):
        if several:
            raise NeedsBatchSizeOne(frozenset())  # hidden states have an axis before that of the samples (Gemma 3n)
        replayed = recorder.logits(inputs, final=hidden)[0]
    else:
        replayed = head_of_rows(feed, recorder, hidden[0].flip(0), max(1, len(ids) // 2)).flip(0)
    if not is_close(feed, replayed, plain):
        raise Unreplayable("a replayed sample gets other logits than the model's own forward gives it")
    if several:
        both = feed.arguments(torch.tensor([ids, ids[::-1]], device=feed.device), [1, 1])
        if not is_close(feed, recorder.logits(both, real=blocks)[0], plain):
            raise NeedsBatchSizeOne(frozenset())


def _replay(feed: Feed, recorder: BlockCallRecorder, blocks: Sequence[int], inputs: Inputs) -> Tensor:
    """Return the hidden states that leave the blocks, with a boundary around every one of them."""
    record, first = recorder.record(inputs)
    boundary = Boundary(first.clone())  # a block may change its input in place
    for block in blocks:
        boundary = run_blocks(feed.skeleton, [block], record, boundary)
    return boundary.hidden
