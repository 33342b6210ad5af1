"""Options of ``combine``."""

import dataclasses
import math

from fisherkit.errors import OptionError
from fisherkit.options.checks import at_least, one_of
from fisherkit.options.extract import STORES, Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """Options of ``combine``.

    Attributes:
        weights: of the files' means, one each, for Fishers of different prompt sets; they need not add up to 1. None
            weighs every file by its samples, which gives the Fisher of all samples together.
        partial: go on where parts are missing.
        store: dtype of the file, ``bf16`` or ``fp32`` (one of these two after construction); ``auto`` is bf16.
        shard_bytes: largest shard when the output is a folder.
        resume: continue what a killed run left in ``<out>.partial/``.
        force: replace an existing output.
    """

    weights: tuple[float, ...] | None = None
    partial: bool = False
    store: Store = "auto"
    shard_bytes: int = 5_000_000_000
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        at_least("max-shard-size", self.shard_bytes, 1)
        one_of("store", self.store, Store)
        object.__setattr__(self, "store", "bf16" if self.store == "auto" else STORES.get(self.store, self.store))
        if self.weights is not None and not (
            self.weights and all(math.isfinite(one) and one > 0 for one in self.weights)
        ):
            raise OptionError(f"--weights takes numbers above 0 such as 1,3, not {','.join(map(str, self.weights))}")


def parse_weights(text: str) -> tuple[float, ...]:
    """Parse ``"1,3"``.

    Raises:
        OptionError: anything but numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--weights takes numbers above 0 such as 1,3, not {text[:80]!r}") from None
