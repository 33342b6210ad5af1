"""``score``: did it forget, and did this fix it? Losses of checkpoints on prompt sets, each streamed once."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fisherkit.methods.score.candidates import open_candidates
from fisherkit.methods.score.report import ScoreReport
from fisherkit.methods.score.run import score_candidates
from fisherkit.options import ScoreOptions
from fisherkit.progress import Say, Track
from fisherkit.prompts.sources import PromptSource


def score(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    prompts: PromptSource | Mapping[str, PromptSource],
    options: ScoreOptions | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    samples: str | os.PathLike[str] | None = None,
    beside: Mapping[Path, Callable[[ScoreReport], bytes]] | None = None,
    work: str | os.PathLike[str] | None = None,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
) -> ScoreReport:
    """Score checkpoints on prompt sets, and compare each with the first.

    Args:
        models: checkpoints, each a folder, file or ``org/name[@revision]``, a PEFT adapter's folder, or a file that
            ``fapm --sparse`` wrote. The first is what the others are compared with.
        prompts: sources by the names of the sets, ``{"old": "general.jsonl", "new": "task.jsonl"}``; a single source is
            a set called ``prompts``. See extract for what a source may be.
        options: how prompts are read and models are run.
        base: what adapters and sparse deltas are put on; the first whole checkpoint of ``models`` if None.
        samples: write a row per sample and checkpoint to this file of JSON lines.
        beside: files to make of the report, such as its picture.
        work: folder that a killed run goes on from; ``<samples>.partial`` if None.
        track: progress, called with stage, done and total.
        say: gets the lines meant for a person.

    Raises:
        FisherkitError: see ``fisherkit.errors``.
    """
    named = prompts if isinstance(prompts, Mapping) else {"prompts": prompts}
    several = [models] if isinstance(models, str | os.PathLike) else models
    with open_candidates(several, base, say) as candidates:
        return score_candidates(
            candidates,
            named,
            options,
            samples=Path(samples) if samples is not None else None,
            beside=beside,
            work=Path(work) if work is not None else None,
            track=track,
            say=say,
        )
