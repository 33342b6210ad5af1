"""Uncentered covariance of a layer's inputs in float64, in full or as a factor and what that leaves out.

Axes: N channels, M directions, K columns of a factor. Arrays in, arrays out: no files, no state, no torch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Moment:
    """Uncentered covariance of N channels, in full or as ``factor factor^T + rest I``.

    Attributes:
        full: [N, N] float64; None where there is a factor.
        factor: [N, K] float64; None where all of it is given.
        rest: energy per channel that the factor leaves out.
    """

    full: Doubles | None
    factor: Doubles | None = None
    rest: float = 0.0

    @classmethod
    def of(cls, values: NDArray[np.float32], *, is_factor: bool, trace: float) -> "Moment":
        """Make one of stored values; what a factor leaves of the ``trace`` counts as alike in all directions."""
        wide = values.astype(np.float64)
        if not is_factor:
            return cls(wide)
        held = float(np.square(wide).sum())
        return cls(None, wide, max(0.0, trace - held) / len(wide))

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.full if self.full is not None else self._factor)

    @property
    def mean(self) -> float:
        """Mean energy of a channel: trace / N."""
        if self.full is not None:
            return float(np.trace(self.full)) / self.size
        return float(np.square(self._factor).sum()) / self.size + self.rest

    @property
    def _factor(self) -> Doubles:
        assert self.factor is not None
        return self.factor

    def within(self, basis: Doubles | None) -> Doubles:
        """Return it [M, M] in an orthonormal basis [N, M]; None is that of the channels."""
        if self.full is not None:
            return self.full if basis is None else basis.T @ self.full @ basis
        inside = self._factor if basis is None else basis.T @ self._factor
        return inside @ inside.T + self.rest * np.eye(len(inside))
