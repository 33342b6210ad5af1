"""Options of ``score``."""

import dataclasses

from fisherkit.errors import OptionError
from fisherkit.options.checks import at_least
from fisherkit.options.extract import RunOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(RunOptions):
    """Options of ``score``; the fields of RunOptions come first.

    Attributes:
        window: cut plain text into windows of so many tokens; ``limit`` counts windows then. None reads each row as a
            sample of its own.
        choices: the column with the choices of multiple-choice questions; None for no such sets.
        by_bytes: compare in bits per byte, which checkpoints of different tokenizers share.
    """

    window: int | None = None
    choices: str | None = None
    by_bytes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("window", self.window, 2)
        if self.window is not None and self.choices is not None:
            raise OptionError("--window is for plain text and --choices for questions; score them in two runs")
