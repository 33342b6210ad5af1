"""Rows of ``--samples``: what each checkpoint made of each sample, so that one can read which prompts got worse."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from fisherkit.methods.score.figures import SampleFigures
from fisherkit.methods.score.prepare import Prepared
from fisherkit.prompts.dataset import Sample

_SHOWN_TOKENS, _SHOWN_CHARACTERS = 100, 200


def sample_rows(prepared: Prepared, figures: Sequence[SampleFigures]) -> Iterator[dict[str, Any]]:
    """Yield a row per checkpoint and sample that is scored, checkpoint by checkpoint.

    Args:
        prepared: the run.
        figures: of each checkpoint, over the samples of all sets.
    """
    first_losses: dict[tuple[str, int], float] = {}
    for number, (model, own) in enumerate(zip(prepared.models, figures, strict=True)):
        start = 0
        for one in model.sets:
            questions = {question.samples[question.right]: question for question in one.questions}
            for place in one.scored:
                sample, at = one.samples[place], start + place
                loss = float(own.loss[at]) / sample.loss_tokens
                before = first_losses.setdefault((one.name, sample.row), loss)
                row: dict[str, Any] = {
                    "checkpoint": model.candidate.name,
                    "set": one.name,
                    "row": sample.row + 1,
                    "tokens": sample.loss_tokens,
                    "loss": loss,
                    "bits_per_byte": _bits(own.loss[at], sample),
                    "accuracy": float(own.hits[at]) / sample.loss_tokens,
                    "exact": bool(own.hits[at] == sample.loss_tokens),
                    "difference": loss - before if number and not prepared.options.by_bytes else None,
                    "kl": _mean(own.kl, at, sample) if number else None,
                    "agreement": _mean(own.agreed, at, sample) if number else None,
                }
                if place in questions:
                    losses = [float(own.loss[start + choice]) for choice in questions[place].samples]
                    row |= {"right": questions[place].right, "choice_losses": losses}
                yield row | _texts(sample, prepared.tokenizer)
            start += len(one.samples)


def _bits(loss: float, sample: Sample) -> float | None:
    return float(loss) / math.log(2) / sample.text_bytes if sample.text_bytes else None


def _mean(sums: Any, at: int, sample: Sample) -> float | None:
    value = None if sums is None else float(sums[at]) / sample.loss_tokens
    return value if value is not None and math.isfinite(value) else None


def _texts(sample: Sample, tokenizer: Any) -> dict[str, str]:
    """Return the start of what a sample says before its first token that counts, and of what counts."""
    first = sample.counts.index(True)
    answer = [token for token, counts in zip(sample.ids, sample.counts, strict=True) if counts]
    return {"prompt": _start(sample.ids[:first], tokenizer), "answer": _start(answer, tokenizer)}


def _start(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids[:_SHOWN_TOKENS], skip_special_tokens=True)
    return text[:_SHOWN_CHARACTERS]
