"""Config of a model: it is read, refused by name where extract cannot measure it, and gives the compute dtype."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

from fisherkit.checkpoint.folder.quantised import DEQUANTISE, quantised_tensor
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.errors import CheckpointError, UnsupportedModelError, first_line


def read_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the model's config, and refuse what extract cannot measure.

    Raises:
        CheckpointError: no config.json, or one that cannot be read.
        UnsupportedModelError: an encoder-decoder, a quantised checkpoint, or no language model at all.
    """
    folder = config_folder(path)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        if "custom code" in str(error):
            raise UnsupportedModelError(
                f"{folder}: runs Python code of its own; read it, then allow it with --trust-remote-code"
            ) from error
        raise CheckpointError(f"{folder / 'config.json'}: {first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{folder}: {config.model_type} is an encoder-decoder; extract measures causal language models"
        )
    if getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None):
        raise UnsupportedModelError(f"{folder}: the checkpoint is quantised; {DEQUANTISE}")
    return config


def config_folder(path: Path) -> Path:
    """Return the folder that the config of a checkpoint lies in.

    Raises:
        CheckpointError: there is none in it.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; MODEL is a folder as save_pretrained writes it, or org/name")
    return folder


def choose_dtype(config: Any, index: CheckpointIndex | None, wanted: str) -> torch.dtype:
    """Return the dtype for ``--dtype``; ``auto`` is that of most bytes of the checkpoint, else of its config."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if index is not None:
        sizes: dict[str, int] = defaultdict(int)
        for info in index.tensors.values():
            sizes[info.dtype] += info.nbytes
        most = max(sizes, key=lambda code: sizes[code], default="F32")
        return stored.get(most, torch.float32)
    return getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or torch.float32


def refuse_quantised(index: CheckpointIndex) -> None:
    """Raise UnsupportedModelError if tensors of the checkpoint are quantised weights or their scales."""
    found = quantised_tensor(index)
    if found is not None:
        raise UnsupportedModelError(
            f"{found.file}: {found.name} ({found.dtype}): the checkpoint is quantised; {DEQUANTISE}"
        )
