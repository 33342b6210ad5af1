"""Tensors of every kind, and the three kinds of target that they are streamed to."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.checkpoint.dtypes import dtype_code
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec

TARGETS = ["fisher.pt", "fisher.safetensors", "fisher"]


def sample_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "matrix": torch.randn(7, 5, generator=generator),
        "bf16": torch.randn(11, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(6).reshape(3, 2),
        "f8": torch.randn(7, generator=generator).to(torch.float8_e4m3fn),
        'name with "quotes" and \u00fc': torch.ones(2),
    }


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, str(dtype_code(t.dtype)), tuple(t.shape)) for name, t in tensors.items()]


def work_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def create(target: Path, tensors: dict[str, Tensor], **options: Any) -> StreamedWriter:
    return StreamedWriter.create(target, specs_of(tensors), work=work_of(target), **options)


def write_all(target: Path, tensors: dict[str, Tensor], *, force: bool = False, **options: Any) -> tuple[Path, ...]:
    with create(target, tensors, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.finish(force=force)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def contents(path: Path) -> dict[str, bytes]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}
