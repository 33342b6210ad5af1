"""Refusals of ``extract`` before its work: outputs that would replace an input, ranks that are not alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fisherkit.checkpoint.hub import ModelSource
from fisherkit.checkpoint.target import check_separate
from fisherkit.engine.model.checks import model_files
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.engine.ranks.ranks import Ranks
from fisherkit.errors import CheckpointError
from fisherkit.prompts.sources import PromptSource, input_files


def check_apart(written: Sequence[Path], source: ModelSource, skeleton: Skeleton, prompts: PromptSource) -> None:
    """Refuse an output of which a file is an input, lies inside of one, or holds one.

    Raises:
        OutputError: see above.
    """
    inputs = model_files(source, skeleton.index) + input_files(prompts)
    check_separate(written, inputs)


def check_alike(ours: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse to measure together what is not the same: another model on one of several machines, another version.

    Args:
        ours: fingerprint of the run in this process.
        ranks: all processes.

    Raises:
        CheckpointError: a rank has another fingerprint than the first one.
    """
    first = ranks.from_first(lambda: dict(ours))
    with ranks.together():
        differing = sorted(key for key in first if first[key] != ours.get(key))
        if differing:
            raise CheckpointError(f"has another {' and another '.join(differing)} than rank 0; give all ranks the same")
