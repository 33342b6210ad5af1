"""Between the floating types of checkpoints and float32, in numpy: no torch, whose import alone takes seconds.

*Stored* arrays hold what is on disk. numpy has no bfloat16: such a tensor is stored as its bits, in uint16. Rounding is
to nearest, ties to even, and NaN stays NaN, as torch does it.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Stored = NDArray[np.generic]
Floats = NDArray[np.float32]

STORED: Mapping[str, np.dtype[np.generic]] = {
    code: np.dtype(kind)
    for code, kind in {
        **{"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4"},
        **{"U64": "<u8", "I64": "<i8", "BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8"},
        **{"F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "F8_E8M0": "u1"},
    }.items()
}
"""numpy type of a stored tensor, by safetensors code."""

FLOATING = frozenset({"BF16", "F16", "F32", "F64"})
"""Codes of the types that weights are computed in."""


def widen(stored: Stored, code: str, out: Floats | None = None) -> Floats:
    """Values of a stored floating array in float32; exact but for F64, which is rounded.

    Args:
        stored: an array of ``STORED[code]``.
        code: one of FLOATING.
        out: where to put them; any memory of the right size otherwise, never ``stored`` itself.
    """
    values = np.empty(stored.shape, np.float32) if out is None else out
    if code == "BF16":
        bits = values.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(values, stored, casting="same_kind")
    return values


def narrow(values: Floats, code: str) -> Stored:
    """Float32 values rounded to a floating type, as a fresh stored array; beyond its range they become infinite."""
    if code != "BF16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(STORED[code])
    bits = values.view(np.uint32)
    wide = np.right_shift(bits, 16, out=np.empty(bits.shape, np.uint32))
    np.bitwise_and(wide, 1, out=wide)
    np.add(wide, 0x7FFF, out=wide)
    np.add(wide, bits, out=wide)
    rounded = np.right_shift(wide, 16, out=wide).astype(np.uint16)
    lost = np.isnan(values)  # the carry can turn NaN into infinity or zero
    if lost.any():
        rounded[lost] = (bits[lost] >> 16 | 0x40).astype(np.uint16)
    return rounded
