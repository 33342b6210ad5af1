"""Refusals of ``extract`` before its work: outputs that would replace an input."""

from collections.abc import Sequence
from pathlib import Path

from fisherkit.checkpoint.hub import ModelSource
from fisherkit.checkpoint.target import check_separate
from fisherkit.engine.model.checks import model_files
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.prompts.sources import PromptSource, input_files


def check_apart(written: Sequence[Path], source: ModelSource, skeleton: Skeleton, prompts: PromptSource) -> None:
    """Refuse an output of which a file is an input, lies inside of one, or holds one.

    Raises:
        OutputError: see above.
    """
    inputs = model_files(source, skeleton.index) + input_files(prompts)
    check_separate(written, inputs)
