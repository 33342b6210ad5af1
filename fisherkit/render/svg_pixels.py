"""Images of many cells as SVG: one path per shade, a tenth of the size of as many rectangles."""

import numpy as np
from numpy.typing import NDArray

from fisherkit.render import svg

SHADES = 32  # as many as the eye tells apart


def shaded(levels: NDArray[np.float64]) -> str:
    """Draw levels from 0 to 1 as squares of side 1, row 0 at y = 0; NaN stays empty.

    Args:
        levels: [rows, columns].
    """
    shades = np.full(levels.shape, -1)
    filled = np.isfinite(levels)
    shades[filled] = np.rint(np.clip(levels[filled], 0, 1) * (SHADES - 1))
    return "".join(squares(shades == shade, fill=svg.colour(shade / (SHADES - 1))) for shade in range(SHADES))


def squares(flags: NDArray[np.bool_], *, css: str = "", fill: str = "") -> str:
    """Draw flagged cells as one path in units of cells; neighbours in a row are one stroke.

    Args:
        flags: [rows, columns].
        css: class of the path.
        fill: its colour; that of the class where empty.
    """
    edges = np.diff(np.pad(flags, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges > 0), np.argwhere(edges < 0)
    path = "".join(f"M{x} {y}h{end - x}v1H{x}z" for (y, x), (_, end) in zip(starts, ends, strict=True))
    return svg.tag("path", css=css, d=path, **({"fill": fill} if fill else {})) if path else ""
