"""Files of the demo's models: whole or not at all, used again where they are there, nobody else's replaced."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fisherkit.checkpoint.atomic import swap_in
from fisherkit.checkpoint.index import open_index
from fisherkit.errors import CheckpointError, OutputError

MARK = "fisherkit_demo"
"""A key in config.json: what carries it is ours to reuse and to replace."""
VERSION = 2
"""Value of that key: models that were trained on other text are trained anew."""
PARENT = "fisherkit_demo_base"
"""Another: the fingerprint of the model that a tuned one was made of."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def is_reusable(target: Path, parent: str | None = None) -> bool:
    """Tell if a whole model of the demo is there, made of the model with fingerprint ``parent`` if that is given.

    Raises:
        OutputError: something is there that is not ours to replace.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    config = _config(target)
    if MARK not in config:
        raise OutputError(f"{target}: is not a model of the demo; choose another --folder")
    try:
        open_index(target)
    except CheckpointError:
        return False
    is_same = config[MARK] == VERSION and config.get(PARENT) == parent
    return is_same and all((target / name).is_file() for name in _FILES)


def _config(folder: Path) -> dict[str, object]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bf16, in three shards or more, with its tokenizer."""
    model = model.to(torch.bfloat16)
    shard_bytes = sum(tensor.nbytes for tensor in model.state_dict().values()) // 3
    with no_progress_bar():
        model.save_pretrained(folder, max_shard_size=shard_bytes)
    tokenizer.save_pretrained(folder)
    for shard in folder.glob("*.safetensors"):  # safetensors 0.8 writes files that nobody else may read
        shard.chmod((folder / "config.json").stat().st_mode)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own: what a person sees goes through track and say."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Make a fresh folder beside the target that takes its place if all goes well.

    Raises:
        OutputError: the place cannot be written.
    """
    staged = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed
        staged.mkdir(parents=True)
        yield staged
        swap_in(staged, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
