"""The face of whatever gives a model its weights: a checkpoint on disk, or one that is computed while it is read.

torch is named for the type alone and imported by whoever implements this.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from fisherkit.checkpoint.index import CheckpointIndex

if TYPE_CHECKING:
    from torch import Tensor


class TensorSource(Protocol):
    """Tensors by checkpoint name, read when asked for; any number of threads may ask at once.

    Whoever opened it closes it, after the last read; tensors stay valid after that.
    """

    @property
    def index(self) -> CheckpointIndex:
        """Names, shapes and stored types of its tensors; BASE's where they are computed from BASE and more."""
        ...

    def read_many(self, names: Sequence[str]) -> "dict[str, Tensor]":
        """Read whole tensors, on the CPU and in their stored types.

        Raises:
            CheckpointError: no such tensor, a type that torch lacks, or a file that cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Return a text that changes when the values do; reads little.

        Raises:
            CheckpointError: a file cannot be read.
        """
        ...

    def close(self) -> None:
        """Close its files; nothing can be read afterwards."""
        ...
