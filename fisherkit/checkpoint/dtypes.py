"""Element types: safetensors' codes, their widths, and their names in torch. Imports no torch before it is asked."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class DType(NamedTuple):
    """Width of one element in bits, and the name of the type in torch (None where torch has no equal)."""

    bits: int
    torch_name: str | None


DTYPES: Mapping[str, DType] = {
    "BOOL": DType(8, "bool"),
    "U8": DType(8, "uint8"),
    "I8": DType(8, "int8"),
    "U16": DType(16, "uint16"),
    "I16": DType(16, "int16"),
    "U32": DType(32, "uint32"),
    "I32": DType(32, "int32"),
    "U64": DType(64, "uint64"),
    "I64": DType(64, "int64"),
    "F4": DType(4, None),
    "F6_E2M3": DType(6, None),
    "F6_E3M2": DType(6, None),
    "F8_E4M3": DType(8, "float8_e4m3fn"),
    "F8_E5M2": DType(8, "float8_e5m2"),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz"),
    "F8_E8M0": DType(8, "float8_e8m0fnu"),
    "F16": DType(16, "float16"),
    "BF16": DType(16, "bfloat16"),
    "F32": DType(32, "float32"),
    "F64": DType(64, "float64"),
    "C64": DType(64, "complex64"),
}
_CODES = {dtype.torch_name: code for code, dtype in DTYPES.items() if dtype.torch_name}


def torch_dtype(code: str) -> "torch.dtype | None":
    """Return the torch type of a safetensors code; None for an unknown code, and where this torch has no equal."""
    import torch

    known = DTYPES.get(code)
    return getattr(torch, known.torch_name, None) if known and known.torch_name else None


def dtype_code(dtype: "torch.dtype") -> str | None:
    """Return the safetensors code of a torch type; None where there is none (quantised types, complex128)."""
    return _CODES.get(str(dtype).removeprefix("torch."))
