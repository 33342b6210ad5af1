"""Options of ``combine``."""

import dataclasses

from fisherkit.options.checks import at_least, check_weights, one_of
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
        if self.weights is not None:
            check_weights(self.weights)
