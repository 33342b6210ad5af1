"""Report on how a prompt set was read: for a person before a long run, and for an artefact's provenance."""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fisherkit.prompts.wording import counted, reasons_of


@dataclass(frozen=True)
class PromptReport:
    """Source, counts and settings of a prompt set as it was read.

    Attributes:
        source: as given; of several files the first, and how many more.
        kind: what the first row's fields were taken for, e.g. ``prompt``, ``text``, ``messages``.
        field: the fields that were read, e.g. ``prompt+completion``.
        rows: rows read, skipped ones included.
        samples: rows that became samples.
        tokens: tokens of all samples.
        loss_tokens: those that count.
        skipped: rows that did not become samples.
        skipped_because: their number by reason.
        truncated: samples cut at ``max_length``.
        folded_system: samples whose system turn went into the first user turn, because the template refuses it.
        realigned: samples with a span found in a rendering that rewrites earlier turns (dropped thoughts).
        chat_template: whether the chat template was used.
        loss: which tokens count: ``all``, ``completion`` or ``assistant``.
        max_length: the longest sample allowed, in tokens.
        sha256: over ids and counts of all samples, in order.
        template_sha256: of the chat template; None where none was used.
        chat_template_kwargs: extra variables of the template.
        rows_used: the samples' rows from 0, as ranges: ``0-16,18-199``.
        dropped_turns: turns of the assistant left out because they came before the first question (ShareGPT).
    """

    source: str
    kind: str
    field: str
    rows: int
    samples: int
    tokens: int
    loss_tokens: int
    skipped: int
    skipped_because: dict[str, int]
    truncated: int
    folded_system: int
    realigned: int
    chat_template: bool
    loss: str
    max_length: int
    sha256: str
    template_sha256: str | None
    chat_template_kwargs: dict[str, Any]
    rows_used: str
    dropped_turns: int = 0

    def line(self) -> str:
        """Say in one line all that a person wants to know before a long run."""
        parts = [
            counted(self.rows, "prompt"),
            f"field {self.field}",
            f"chat template {'on' if self.chat_template else 'off'}",
            f"{self.truncated:,} truncated",
            f"{self.skipped:,} skipped" + (f" ({reasons_of(self.skipped_because)})" if self.skipped else ""),
            counted(self.loss_tokens, "loss token"),
        ]
        if self.folded_system:
            parts.append(counted(self.folded_system, "system turn") + " folded in")
        if self.realigned:
            parts.append(f"{self.realigned:,} realigned")
        if self.dropped_turns:
            parts.append(counted(self.dropped_turns, "turn") + " before the first question dropped")
        return ", ".join(parts)


def hash_samples(samples: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> str:
    """Hash token ids and counts of all samples, in order, each behind its length; integers of 32 bits."""
    digest = hashlib.sha256()
    for ids, counts in samples:
        digest.update(struct.pack(f"<I{len(ids)}I", len(ids), *ids) + bytes(counts))
    return digest.hexdigest()


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2,5"``; numbers ascend."""
    starts = [n for n, before in zip(numbers, [None, *numbers], strict=False) if before is None or n != before + 1]
    ends = [n for n, after in zip(numbers, [*numbers[1:], None], strict=True) if after is None or after != n + 1]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))
