"""Tensors of a file that torch.save wrote (`.pt`, `.pth`, `.bin`); never runs code from it."""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.checkpoint.dtypes import dtype_code
from fisherkit.checkpoint.headers import TensorInfo, file_size, looks_like, read_start
from fisherkit.errors import CheckpointError

_SHARED = 16
"""Tensors may share a storage, as tied weights do: all together they are at most so many times the file's size."""


def load_torch_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a flat dict, or of the one flat dict inside a dict; mapped, so nothing is read yet.

    Files in torch's old format (before 1.6) cannot be mapped and are read whole.

    Raises:
        CheckpointError: not such a file, damaged, asks for more than tensors, or holds something else.
    """
    size = file_size(path)
    zipped = read_start(path, 4) == b"PK\x03\x04"
    if zipped:
        _refuse_compressed(path)
    try:
        # weights_only is said out loud: an environment variable can turn the default off.
        with warnings.catch_warnings(action="ignore"):  # what torch mutters about a file that it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(_reason(path, error)) from None
    tensors = _unwrap(path, loaded)
    _refuse_repeated(path, tensors, size)
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or not dtype_code(tensor.dtype):
            kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
            raise CheckpointError(f"{path}: tensor {name!r} is {kind}; only dense ones of common types can be read")
    return tensors


def _refuse_compressed(path: Path) -> None:
    """Refuse a zip that packed its records: mapped, their packed bytes would be taken for values.

    Raises:
        CheckpointError: see above.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [record.filename for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch says what is wrong with it
    if packed:
        raise CheckpointError(
            f"{path}: {len(packed)} records of it are compressed, such as {packed[0]}, which torch.save never does; "
            "load it with torch.load where you trust it, and save it again"
        )


def _refuse_repeated(path: Path, tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse views that make more of a storage than it holds: one element can pose as 10^12.

    Raises:
        CheckpointError: a tensor is larger than its storage, or all together far larger than the file.
    """
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            continue  # refused by its kind
        total += (nbytes := tensor.numel() * tensor.itemsize)
        if nbytes > tensor.untyped_storage().nbytes() or total > _SHARED * max(size, 1 << 20):
            raise CheckpointError(
                f"{path}: tensor {name!r} repeats what is stored, {nbytes:,} bytes of it; save its .contiguous()"
            )


def torch_infos(path: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of a torch file, in its order; ``start`` is -1.

    Raises:
        CheckpointError: as load_torch_file.
    """
    return {
        name: TensorInfo(
            name, str(dtype_code(tensor.dtype)), tuple(tensor.shape), path, -1, tensor.numel() * tensor.itemsize
        )
        for name, tensor in load_torch_file(path).items()
    }


def sample_digests(path: Path, windows: Mapping[str, Iterable[tuple[int, int]]]) -> dict[str, bytes]:
    """SHA-256 of the given byte ranges of each tensor of a torch file."""
    tensors = load_torch_file(path)
    digests = {}
    for name, ranges in windows.items():
        data = tensors[name].reshape(-1).view(torch.uint8)
        digests[name] = hashlib.sha256(b"".join(data[a:b].numpy().tobytes() for a, b in ranges)).digest()
    return digests


def _reason(path: Path, error: Exception) -> str:
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
        return (
            f"{path}: refused: the pickle in it asks for {wanted[1]}, and only tensors are read; "
            "convert it to safetensors where you trust it"
        )
    other = looks_like(path)
    if other and "torch.save" not in other:
        return f"{path}: not a torch file: {other}"
    detail = str(error).split(". ")[0].splitlines()
    said = f" ({detail[0][:120]})" if detail and not isinstance(error, pickle.UnpicklingError) else ""
    return f"{path}: damaged, or not a file of tensors that torch.save wrote{said}; fetch it again"


def _unwrap(path: Path, loaded: Any) -> dict[str, Tensor]:
    flat = [loaded] if _is_flat(loaded) else []
    if not flat and isinstance(loaded, dict):
        flat = [value for value in loaded.values() if _is_flat(value)]
    if len(flat) != 1:
        held = f"{len(flat)} dicts of tensors" if flat else f"a {type(loaded).__name__} without one"
        raise CheckpointError(f"{path}: expected one dict of named tensors, found {held}; save just that dict")
    return {name: tensor.detach() for name, tensor in flat[0].items()}


def _is_flat(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())
    )
