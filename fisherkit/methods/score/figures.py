"""Figures per sample, from those of its tokens; and of a set, with intervals, from those of its samples.

Axes: S samples of all sets, in order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fisherkit.checkpoint.schema import listed, maybe, number, table, whole
from fisherkit.engine.sweep.token_figures import TokenFigures
from fisherkit.kernels.intervals import ratio_difference, ratio_mean, share
from fisherkit.methods.score.report import Change, Choices, Measure, SetScore
from fisherkit.methods.score.sets import ScoredSet
from fisherkit.prompts.dataset import Sample

WORSE = 0.1
"""A sample got worse if its own loss rose by more than this, in nats per token."""
SCHEMA = table(
    {"loss": listed(number()), "hits": listed(whole())},
    {"kl": maybe(listed(maybe(number()))), "agreed": maybe(listed(whole()))},
)
"""Figures of one checkpoint, as the work folder has them."""

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class SampleFigures:
    """Figures of one checkpoint, each summed over the tokens of a sample that count.

    Attributes:
        loss: [S] nats.
        hits: [S] tokens that are the likeliest.
        kl: [S] nats, against the first checkpoint; None where there is nothing to compare with.
        agreed: [S] tokens that both find likeliest.
    """

    loss: Sums
    hits: Sums
    kl: Sums | None
    agreed: Sums | None

    @classmethod
    def of_tokens(cls, tokens: TokenFigures, samples: Sequence[Sample]) -> Self:
        """Add tokens up by sample."""
        starts = np.cumsum([0, *(sample.loss_tokens for sample in samples[:-1])])

        def added(values: Any) -> Sums:
            return np.add.reduceat(values.numpy().astype(np.float64), starts)

        return cls(
            added(tokens.loss),
            added(tokens.hit),
            added(tokens.kl) if tokens.kl is not None else None,
            added(tokens.agreed) if tokens.agreed is not None else None,
        )

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what as_json wrote."""
        kl, agreed = content.get("kl"), content.get("agreed")
        return cls(
            np.array(content["loss"], np.float64),
            np.array(content["hits"], np.float64),
            np.array([math.inf if one is None else one for one in kl], np.float64) if kl is not None else None,
            np.array(agreed, np.float64) if agreed is not None else None,
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values; an infinite divergence is null."""
        kl = None if self.kl is None else [one if math.isfinite(one) else None for one in self.kl.tolist()]
        agreed = None if self.agreed is None else [int(one) for one in self.agreed]
        return {"loss": self.loss.tolist(), "hits": [int(one) for one in self.hits], "kl": kl, "agreed": agreed}

    def part(self, numbers: Sequence[int]) -> "SampleFigures":
        """Return the figures of some samples."""
        at = list(numbers)
        return SampleFigures(
            self.loss[at],
            self.hits[at],
            None if self.kl is None else self.kl[at],
            None if self.agreed is None else self.agreed[at],
        )


@dataclass(frozen=True)
class SetFigures:
    """One checkpoint on one set: its figures and the samples that they are of, row by row."""

    samples: tuple[Sample, ...]
    figures: SampleFigures

    @property
    def tokens(self) -> Sums:
        """Tokens of each sample that count."""
        return np.array([sample.loss_tokens for sample in self.samples], np.float64)

    @property
    def text_bytes(self) -> Sums:
        """Bytes of each sample that count."""
        return np.array([sample.text_bytes for sample in self.samples], np.float64)


def figures_of_set(own: ScoredSet, start: int, figures: SampleFigures, rows: frozenset[int]) -> SetFigures:
    """Return the figures of a set's scored samples.

    Args:
        own: the set, in the checkpoint's tokens.
        start: number of its first sample among those of all sets.
        figures: of all sets.
        rows: that every checkpoint has a sample of.
    """
    numbers = [number for number in own.scored if own.samples[number].row in rows]
    return SetFigures(
        tuple(own.samples[number] for number in numbers), figures.part([start + number for number in numbers])
    )


def set_score(own: SetFigures, first: SetFigures | None, measure: Measure, choices: Choices | None) -> SetScore:
    """Return the figures of a set with their intervals.

    Args:
        own: of the checkpoint.
        first: of the first checkpoint, the same rows in the same order; None for that one itself.
        measure: what changes are in.
        choices: of multiple choice.
    """
    tokens, nbytes, found = own.tokens, own.text_bytes, own.figures
    loss, ci95 = ratio_mean(found.loss, tokens)
    bits, bits_ci95 = ratio_mean(found.loss / math.log(2), nbytes) if nbytes.sum() else (None, None)
    return SetScore(
        samples=len(own.samples),
        tokens=int(tokens.sum()),
        loss=loss,
        ci95=ci95,
        perplexity=math.exp(min(loss, 700.0)),  # beyond, a float has no word for it
        accuracy=float(found.hits.sum() / tokens.sum()),
        exact=float(np.mean(found.hits == tokens)),
        bits_per_byte=bits,
        bits_ci95=bits_ci95,
        change=None if first is None else _change(own, first, measure),
        choices=choices,
    )


def _change(own: SetFigures, first: SetFigures, measure: Measure) -> Change:
    tokens, kl, agreed = own.tokens, own.figures.kl, own.figures.agreed
    if measure == "loss":
        difference, ci95 = ratio_difference(own.figures.loss, tokens, first.figures.loss, first.tokens)
        worse = float(np.mean(own.figures.loss / tokens - first.figures.loss / first.tokens > WORSE))
    else:
        nats = math.log(2)
        difference, ci95 = ratio_difference(
            own.figures.loss / nats, own.text_bytes, first.figures.loss / nats, first.text_bytes
        )
        worse = None
    divergence = None if kl is None else float(kl.sum() / tokens.sum())
    return Change(
        difference=difference,
        ci95=ci95,
        worse=worse,
        kl=divergence if divergence is not None and math.isfinite(divergence) else None,
        agreement=None if agreed is None else float(agreed.sum() / tokens.sum()),
    )


def choice_score(own: ScoredSet, start: int, figures: SampleFigures, rows: frozenset[int]) -> Choices | None:
    """Return how many questions are answered right; None for a set without any.

    The choice of lowest loss is taken, or of lowest loss by character; the first of equals. So do acc and acc_norm of
    lm-evaluation-harness: argmax of log-likelihoods, and of those divided by the choice's length.

    Args:
        own: the set, in the checkpoint's tokens.
        start: number of its first sample among those of all sets.
        figures: of all sets.
        rows: that every checkpoint has a sample of.
    """
    questions = [question for question in own.questions if question.row in rows]
    if not questions:
        return None
    plain, normed = [], []
    for question in questions:
        losses = figures.loss[[start + number for number in question.samples]]
        plain.append(int(np.argmin(losses)) == question.right)
        normed.append(int(np.argmin(losses / np.maximum(question.lengths, 1))) == question.right)
    accuracy, ci95 = share(plain)
    accuracy_norm, norm_ci95 = share(normed)
    return Choices(
        questions=len(questions), accuracy=accuracy, ci95=ci95, accuracy_norm=accuracy_norm, norm_ci95=norm_ci95
    )
