"""Refusals before a model is run: config, weights and prompts that do not belong together."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.hub import ModelSource
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import CheckpointError, OptionError
from fisherkit.prompts.dataset import Sample

_SIDE_FILES = ("config", "generation_config", "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_")
"""Beginnings of the names of files that are read beside the weights."""
_MOST = {"layers": 2_000, "experts": 10_000}
"""Counts above these are absurd: building such a model takes hours, though it holds no weights."""
_COUNTS = re.compile(r"(?:^|_)(?:n_layer|layers|blocks|depth)$|(?:^|_)(experts)$")
_CONSTANT = re.compile(r"\.(masked_bias|inv_freq)$")
"""Endings of constants that old checkpoints hold and no model reads any more."""


def check_counts(source: ModelSource) -> None:
    """Refuse a config.json with absurdly many layers or experts, before a model is built from it.

    Raises:
        CheckpointError: see above, or it is no JSON.
    """
    path = folder_of(source) / "config.json"
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        counts = [(key, value) for key, value in _whole_numbers(content) if _COUNTS.search(key)]
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: is no JSON that can be read; fetch it again") from None
    for key, value in counts:
        if value > _MOST["experts" if key.endswith("experts") else "layers"]:
            raise CheckpointError(f"{path}: {key} is {str(value)[:20]}, which no model has; mend it or fetch it again")


def check_all_taken(source: ModelSource, skeleton: Skeleton) -> None:
    """Refuse a checkpoint whose blocks hold tensors that the model of its config has no parameter for.

    With fewer layers in config.json than in the checkpoint, half a model would be measured. What transformers
    ignores by rule is no error: its patterns, constants and buffers that are computed, and the layers behind the others
    that predict further tokens.

    Raises:
        CheckpointError: there are such tensors; the first is named.
    """
    assert skeleton.index is not None
    count = len(skeleton.blocks)
    place = re.compile("|".join(map(re.escape, _block_prefixes(skeleton))) or r"(?!)")
    rules = [*(getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()), _CONSTANT.pattern]
    ignored = re.compile("|".join(f"(?:{rule})" for rule in rules))
    further = getattr(skeleton.model.config.get_text_config(), "num_nextn_predict_layers", 0) or 0
    buffers = {name.removeprefix(f"{skeleton.blocks_path}.") for name, _ in skeleton.model.named_buffers()}
    odd = []
    for name in skeleton.index.tensors.keys() - skeleton.names.parameter_of.keys():
        found = re.match(rf"(?:{place.pattern})((\d+)\..*)", name)
        if found and not (count <= int(found[2]) < count + further or found[1] in buffers or ignored.search(name)):
            odd.append(name)
    if odd:
        raise CheckpointError(
            f"{source.path}: {len(odd)} tensors of its blocks belong to no parameter of the {count} layers that "
            f"config.json makes, such as {min(odd)}; the config belongs to another model"
        )


def check_fit(source: ModelSource, skeleton: Skeleton, samples: Sequence[Sample]) -> None:
    """Refuse samples that the model has no embeddings or no positions for.

    Raises:
        CheckpointError: the tokenizer belongs to another model.
        OptionError: a sample is too long.
    """
    largest = max(max(sample.ids) for sample in samples)
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise CheckpointError(
            f"{source.path}: the tokenizer gives token {largest}, but the model embeds only {rows}; "
            "the tokenizer belongs to another model"
        )
    longest = max(len(sample.ids) for sample in samples)
    positions = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < longest:  # some configs say -1 for no limit
        raise OptionError(f"--max-length {longest}: the model has {positions} positions; use --max-length {positions}")


def model_files(source: ModelSource, index: CheckpointIndex | None) -> list[Path]:
    """Return the paths that a model is read from: where it is, its tensors, and what lies beside them."""
    files = [source.path]
    if index is not None:
        files += index.files  # which may be links to anywhere
    return files + [path for path in folder_of(source).iterdir() if path.name.startswith(_SIDE_FILES)]


def folder_of(source: ModelSource) -> Path:
    """Return the folder that config and tokenizer lie in."""
    return source.path if source.path.is_dir() else source.path.parent


def _block_prefixes(skeleton: Skeleton) -> list[str]:
    """Return what the names of block tensors begin with on the disk, up to the block's number."""
    found = set()
    for tensor, parameter in skeleton.names.parameter_of.items():
        block = skeleton.block_of(parameter)
        head = re.match(rf"(.*?\.|){block}\.", tensor) if block is not None else None
        if head:
            found.add(head[1])
    return sorted(found)


def _whole_numbers(content: Any) -> Iterator[tuple[str, int]]:
    """Yield every whole number of a JSON value with its key; nested configs included."""
    if isinstance(content, dict):
        for key, value in content.items():
            if type(value) is int:
                yield key, value
            else:
                yield from _whole_numbers(value)
