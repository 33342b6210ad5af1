"""What every token that counts is predicted from, kept in the work folder; and its logits, a few rows at a time.

Axes: N tokens that count, over all samples in order; R of them at a time; H hidden; V vocabulary. What follows the
last block of a model (final norm, head, caps and scales) treats each token by itself. So the hidden states of any R
tokens are put where the last block's output would be, and the model's own forward makes their logits: no [T, V] of a
whole batch ever exists, and no head is re-implemented.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fisherkit.engine.model.copies import send_small
from fisherkit.engine.sweep.feed import Feed
from fisherkit.engine.sweep.recorder import BlockCallRecorder
from fisherkit.engine.sweep.spool import Spool
from fisherkit.prompts.dataset import Sample

MOST_LOGITS = 1 << 24
"""Numbers in one piece of logits [R, V]: 64 MB in float32, whatever the vocabulary is."""

Kind = Literal["hidden", "whole", "logits"]
"""Of a sample is kept: hidden states [n, H] of its n tokens; all hidden states, where only the model knows their axes;
or logits [n, V] of the tokens, where the blocks cannot be replayed."""


class LastRows:
    """Rows of one model.

    Attributes:
        labels: token ids [N] to be predicted, on the CPU.
        chunk: R, how many rows a caller should ask for at a time.

    Args:
        feed: the model and its samples.
        recorder: runs what follows its blocks; None where logits are kept.
        spool: that they are kept in.
    """

    def __init__(self, feed: Feed, recorder: BlockCallRecorder | None, spool: Spool) -> None:
        self._feed, self._recorder, self._spool = feed, recorder, spool
        self._starts = [0, *accumulate(sample.loss_tokens for sample in feed.samples)]
        labels = [
            token for sample in feed.samples for token, counts in zip(sample.ids, sample.counts, strict=True) if counts
        ]
        self.labels = torch.tensor(labels)
        self._longest = max(len(sample.ids) for sample in feed.samples)
        self.chunk = rows_at_a_time(feed.skeleton.model.config.get_text_config().vocab_size, self._longest)

    def keep(self, batch: Sequence[int], hidden: Tensor) -> None:
        """Keep what leaves the last block for the samples of a batch: [B, T, H], or for one sample any axes."""
        lengths = self._feed.lengths(batch)
        if hidden.ndim == 3 and hidden.shape[:2] == (len(batch), max(lengths)):
            for row, number in enumerate(batch):
                self._put(number, "hidden", self._counted(number, hidden[row]))
        else:
            (number,) = batch
            self._put(number, "whole", hidden)

    def keep_logits(self, number: int, logits: Tensor) -> None:
        """Keep the logits [T, V] of a sample."""
        self._put(number, "logits", self._counted(number, logits))

    def finish(self) -> None:
        """Put everything on the disk, for a run that goes on."""
        self._spool.finish()

    def close(self) -> None:
        """Let go of the file."""
        self._spool.close()

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        """Return the logits [R, V] of the tokens from ``start`` to ``stop``; the model holds its outer weights."""
        first, last = bisect_right(self._starts, start) - 1, bisect_right(self._starts, stop - 1) - 1
        kept = [self._rows(number) for number in range(first, last + 1)]
        rows = torch.cat([rows for _, rows in kept])[start - self._starts[first] : stop - self._starts[first]]
        return self._head(rows) if kept[0][0] == "hidden" else rows

    def _put(self, number: int, kind: Kind, rows: Tensor) -> None:
        self._spool.put(str(number), [rows], kind)

    def _rows(self, number: int) -> tuple[Kind, Tensor]:
        """Return hidden states or logits [n, .] of a sample's tokens, on the device."""
        (rows,), kind = self._spool.get(str(number), self._feed.device)
        if kind != "whole":
            return kind, rows
        assert self._recorder is not None
        logits = self._recorder.logits(self._feed.inputs([number]), final=rows)[0]
        return kind, self._counted(number, logits)

    def _counted(self, number: int, rows: Tensor) -> Tensor:
        """Return those rows [n, .] of a sample's [T, .] from which the tokens that count are predicted."""
        return rows.index_select(0, send_small(places(self._feed.samples[number]), rows.device))

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] of hidden states [R, H], laid out as samples of a length that the model takes."""
        assert self._recorder is not None
        return head_of_rows(self._feed, self._recorder, hidden, self._longest)


def head_of_rows(feed: Feed, recorder: BlockCallRecorder, hidden: Tensor, longest: int) -> Tensor:
    """Return the logits [R, V] of hidden states [R, H] of tokens that need not follow each other.

    Args:
        feed: the model.
        recorder: of that model, which has recorded a batch before.
        hidden: as it leaves the last block.
        longest: tokens of a sample that the model is known to take.
    """
    count, length = len(hidden), min(len(hidden), longest)
    padded = F.pad(hidden, (0, 0, 0, -count % length)).view(-1, length, hidden.shape[-1])
    ids = torch.zeros(padded.shape[:2], dtype=torch.long, device=hidden.device)
    return recorder.logits(feed.arguments(ids, [1] * len(ids)), final=padded).flatten(0, 1)[:count]


def places(sample: Sample) -> list[int]:
    """Return the places of the tokens from which those that count are predicted: each one's neighbour to the left."""
    return [place - 1 for place, counts in enumerate(sample.counts) if counts]


def rows_at_a_time(vocabulary: int, longest: int) -> int:
    """Return R: as many rows as MOST_LOGITS allows, and whole samples where more than one fits."""
    rows = max(1, MOST_LOGITS // vocabulary)
    return rows // longest * longest if rows > longest else rows
