"""Nested selections of the entries of a delta, in one pass: scores are computed once, however many densities there are.

Of two densities the larger keeps all that the smaller does, since ties go to the lower index. So one number per entry
says everything: its *depth*, the number of selections that keep it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherkit.floats import Floats
from fisherkit.kernels.prune_scores import Draw, Scratch, deltas, exclude_ineligible, score
from fisherkit.kernels.tensor_pair import TensorPair
from fisherkit.kernels.top_k import ThresholdRange, top_k_mask

Depths = NDArray[np.uint8]
MOST = np.iinfo(np.uint8).max
"""Selections that a depth can count."""


@dataclass(frozen=True)
class BlockDepths:
    """Findings of one pass over one block.

    Attributes:
        nonfinite: entries that are NaN or infinite in either checkpoint.
        above: by selection, how many entries score above its threshold range.
        candidates: by selection, places [c] in the block of the entries inside its range, ascending.
        scores: by selection, their scores [c] float32.
    """

    nonfinite: int
    above: list[int]
    candidates: list[NDArray[np.int64]]
    scores: list[Floats]


def count_block(
    pair: TensorPair, ranges: Sequence[ThresholdRange], scratch: Scratch, draw: Draw, out: Depths
) -> BlockDepths:
    """Count for every entry the selections that keep it at sight, and list the candidates of each.

    Args:
        pair: one block of a tensor, at most BLOCK entries.
        ranges: a threshold range per selection; see kernels.top_k.
        scratch: the thread's memory.
        draw: where random scores come from.
        out: [n] where the counts go.
    """
    size = pair.base.size
    w, d = deltas(pair.base, pair.base_code, pair.tuned, pair.tuned_code, scratch)
    s, (above, inside) = scratch.floats[2][:size], (flags[:size] for flags in scratch.flags)
    np.abs(w, out=w)
    np.abs(d, out=d)
    score(pair.metric, w, d, pair.mean, s, draw)
    exclude_ineligible(pair.metric, w, d, s)
    found = BlockDepths(
        0 if size == 0 or np.isfinite(d.max()) else int(size - np.count_nonzero(np.isfinite(d))), [], [], []
    )
    out[:] = 0
    for one in ranges:
        np.greater(s, one.high, out=above)
        np.greater_equal(s, one.low, out=inside)
        np.bitwise_xor(above, inside, out=inside)  # what is above is also inside: this takes it out
        np.add(out, above.view(np.uint8), out=out)
        places = np.flatnonzero(inside)
        found.above.append(int(np.count_nonzero(above)))
        found.candidates.append(places)
        found.scores.append(s[places])
    return found


def add_top_candidates(
    depths: Depths, blocks: Sequence[BlockDepths], starts: Sequence[int], selection: int, wanted: int
) -> None:
    """Count the highest-scored candidates of one selection as kept; ties go to the lower index.

    Args:
        depths: [n] of the whole tensor, changed.
        blocks: what count_block returned, in the order of the blocks.
        starts: where each block begins.
        selection: its number.
        wanted: how many of its candidates to keep.
    """
    at_starts = zip(blocks, starts, strict=True)
    places = np.concatenate([block.candidates[selection] + start for block, start in at_starts])
    scores = np.concatenate([block.scores[selection] for block in blocks])
    depths[places[top_k_mask(scores, wanted)]] += 1
