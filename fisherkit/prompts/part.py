"""One of several parts of a prompt set, dealt out so that all of them take about as long."""

from dataclasses import dataclass, replace
from typing import Any

from fisherkit.errors import PromptError
from fisherkit.kernels.deal import deal
from fisherkit.options.part import Part
from fisherkit.prompts.dataset import PromptSet
from fisherkit.prompts.report import hash_samples, ranges


@dataclass(frozen=True)
class PartOfSet:
    """What a part is a part of.

    Attributes:
        part: which one.
        sha256: of the whole set; see PromptReport.
        samples: of the whole set.
    """

    part: Part
    sha256: str
    samples: int

    def as_json(self) -> dict[str, Any]:
        """Return it as a sidecar notes it."""
        return {"number": self.part.number, "of": self.part.of, "sha256": self.sha256, "samples": self.samples}


def take_part(prompts: PromptSet, part: Part) -> tuple[PromptSet, PartOfSet]:
    """Return one part of a prompt set.

    Its report counts its own samples and tokens; rows, skipped and truncated ones are the whole set's.

    Raises:
        PromptError: there are more parts than samples, and this one is empty.
    """
    whole = prompts.report
    own = deal([len(sample.ids) for sample in prompts.samples], part.of)[part.number - 1]
    if not own:
        raise PromptError(
            f"{whole.source}: has {whole.samples} samples, so part {part} is empty; use {whole.samples} parts at most"
        )
    samples = tuple(prompts.samples[index] for index in own)
    report = replace(
        whole,
        samples=len(samples),
        tokens=sum(len(sample.ids) for sample in samples),
        loss_tokens=sum(sample.loss_tokens for sample in samples),
        sha256=hash_samples((sample.ids, sample.counts) for sample in samples),
        rows_used=ranges([sample.row for sample in samples]),
    )
    return PromptSet(samples, report), PartOfSet(part, whole.sha256, whole.samples)
