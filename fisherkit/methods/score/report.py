"""Report of ``score``: per checkpoint and prompt set the figures, and what changed against the first checkpoint.

Losses are in nats. The loss of a set is that of its tokens: the sum over all that count, by their number, so that its
exponential is the perplexity. Its interval is over samples, since the tokens of a sample go together; see
kernels.intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Measure = Literal["loss", "bits_per_byte"]
"""In what checkpoints are compared: nats per token, or, where tokenizers differ, bits per byte."""


FIGURES = (
    *("samples", "tokens", "loss", "ci95", "perplexity", "accuracy", "exact"),
    *("bits_per_byte", "bits_ci95"),
)
COLUMNS = ("checkpoint", "set", *FIGURES, "difference", "difference_ci95", "worse", "kl", "agreement")
CHOICE_COLUMNS = ("questions", "choice_accuracy", "choice_ci95", "choice_accuracy_norm", "choice_norm_ci95")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Multiple choice as evaluations count it.

    Attributes:
        questions: how many there are.
        accuracy: share of questions whose right choice has the lowest loss, summed over its tokens.
        ci95: half of the width of its 95 % interval; None for a single question.
        accuracy_norm: the same with each loss divided by the choice's length in characters.
        norm_ci95: half of the width of its interval.
    """

    questions: int
    accuracy: float
    ci95: float | None
    accuracy_norm: float
    norm_ci95: float | None


@dataclass(frozen=True, kw_only=True)
class Change:
    """What changed against the first checkpoint, on the same samples.

    Attributes:
        difference: this checkpoint's figure minus the first's, in the report's measure; above 0 is worse.
        ci95: half of the width of its 95 % interval, paired by sample; None for a single sample.
        worse: share of the samples whose own loss rose by more than 0.1 nats per token; None in bits per byte.
        kl: mean over tokens of KL(first || this), in nats; None where tokens are not the same.
        agreement: share of tokens at which both find the same token most likely; None where tokens are not the same.
    """

    difference: float
    ci95: float | None
    worse: float | None
    kl: float | None
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """Figures of one checkpoint on one prompt set.

    Attributes:
        samples: that were scored; of multiple choice, the right choices.
        tokens: that count in the loss.
        loss: nats per token.
        ci95: half of the width of its 95 % interval over samples; None for a single sample.
        perplexity: exp(loss).
        accuracy: share of tokens that are the most likely one at their place.
        exact: share of samples of which every token that counts is the most likely one: the answer that greedy decoding
            would give.
        bits_per_byte: the loss of all tokens in bits, by the bytes of their text in UTF-8; None where that has none.
        bits_ci95: half of the width of its 95 % interval.
        change: against the first checkpoint; None for that one itself.
        choices: None where the set is no multiple choice.
    """

    samples: int
    tokens: int
    loss: float
    ci95: float | None
    perplexity: float
    accuracy: float
    exact: float
    bits_per_byte: float | None
    bits_ci95: float | None
    change: Change | None
    choices: Choices | None


@dataclass(frozen=True, kw_only=True)
class CheckpointScore:
    """One checkpoint.

    Attributes:
        name: as it was given.
        sets: figures by the name of the prompt set.
        engine: ``stream`` or ``resident``.
    """

    name: str
    sets: Mapping[str, SetScore]
    engine: str


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """Result of ``score``.

    Attributes:
        measure: what ``change.difference`` is in.
        sets: names of the prompt sets, in order; what was read of each.
        checkpoints: in order; the first is what the others are compared with.
        made: versions, options and what else tells how the figures came about.
    """

    measure: Measure
    sets: Mapping[str, Mapping[str, Any]]
    checkpoints: Sequence[CheckpointScore]
    made: Mapping[str, Any]

    def value(self, checkpoint: CheckpointScore, name: str) -> tuple[float | None, float | None]:
        """Return a checkpoint's figure on a set in the report's measure, and half the width of its interval."""
        found = checkpoint.sets[name]
        if self.measure == "loss":
            return found.loss, found.ci95
        return found.bits_per_byte, found.bits_ci95

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of ``records``; those of multiple choice where there is any."""
        asked = any(found.choices for one in self.checkpoints for found in one.sets.values())
        return (*COLUMNS, *(CHOICE_COLUMNS if asked else ()))

    def records(self) -> list[dict[str, str | int | float | None]]:
        """Return a plain row per checkpoint and set."""
        rows = []
        for checkpoint in self.checkpoints:
            for name, found in checkpoint.sets.items():
                change, choices = found.change, found.choices
                row: dict[str, str | int | float | None] = {"checkpoint": checkpoint.name, "set": name}
                row |= {column: getattr(found, column) for column in FIGURES}
                row |= {column: getattr(change, column, None) for column in ("difference", "worse", "kl", "agreement")}
                row["difference_ci95"] = change.ci95 if change else None
                row |= {column: getattr(choices, column.removeprefix("choice_"), None) for column in CHOICE_COLUMNS}
                rows.append(row)
        return rows

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)
