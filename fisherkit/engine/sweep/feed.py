"""Samples in batches, as the arguments that a model's forward is called with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherkit.engine.model.copies import send_small
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.prompts.dataset import Sample

Inputs = dict[str, Tensor]
"""Arguments of the model's forward: ``input_ids`` [B, T], and ``token_type_ids`` [B, T] where they are needed."""


def prefix_types(ids: Tensor, starts: Sequence[int]) -> Tensor:
    """Return token types [B, T]: 0 for the prefix, whose tokens see each other, 1 from each sample's start on.

    So do models that read pictures and a prompt as one prefix (PaliGemma): without types they take all for prefix.
    """
    return (torch.arange(ids.shape[1], device=ids.device) >= send_small(starts, ids.device)[:, None]).long()


@dataclass(kw_only=True)
class Feed:
    """A model and the samples that it is run on.

    Attributes:
        skeleton: the model.
        samples: of the prompt set.
        batches: numbers of the samples that are padded together.
        device: to compute on.
        token_types: tell the model which tokens are before the first one that counts, see ``prefix_types``.
    """

    skeleton: Skeleton
    samples: Sequence[Sample]
    batches: Sequence[Sequence[int]]
    device: torch.device
    token_types: bool = False

    def ids(self, batch: Sequence[int]) -> Tensor:
        """Return token ids [B, T] on the device, short samples filled up on the right with their own last token.

        No padding mask is needed: a causal model never looks to the right, and pads have no loss.
        """
        rows = [self.samples[number].ids for number in batch]
        longest = max(map(len, rows))
        return send_small([[*row, *[row[-1]] * (longest - len(row))] for row in rows], self.device)

    def inputs(self, batch: Sequence[int]) -> Inputs:
        """Return the arguments that the model is called with for a batch, on the device."""
        starts = [self.samples[number].counts.index(True) for number in batch]
        return self.arguments(self.ids(batch), starts)

    def arguments(self, ids: Tensor, starts: Sequence[int]) -> Inputs:
        """Return the model's arguments for token ids [B, T] whose losses start at these tokens."""
        types = {"token_type_ids": prefix_types(ids, starts)} if self.token_types else {}
        return {"input_ids": ids, **types}

    def lengths(self, batch: Sequence[int]) -> list[int]:
        """Return the number of real tokens of each sample of a batch."""
        return [len(self.samples[number].ids) for number in batch]
