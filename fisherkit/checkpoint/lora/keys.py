"""Roles of the tensors of a PEFT adapter file, read off their keys.

    base_model.model.<module>.lora_A.weight                     factors [r, in] and [out, r]
    base_model.model.<module>.lora_embedding_A                  factors [r, vocabulary] and [hidden, r]
    base_model.model.<module>.lora_magnitude_vector             DoRA's magnitudes [out]
    base_model.model.<module>.base_layer.lora_A.weight          factors of another parameter of the same module
    base_model.model.<module>.base_layer.weight                 a copy of the base weight, put there with embeddings
    base_model.model.<module>.token_adapter.trainable_tokens_delta   rows that replace those of an embedding
    base_model.model.<name of a tensor>                         a tensor that replaces the base's (modules_to_save)

Older files have the adapter's own name in between (``lora_A.default.weight``). Standard library only.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fisherkit.checkpoint.lora.config import merge_first
from fisherkit.errors import CheckpointError

Role = Literal["A", "B", "embedding_A", "embedding_B", "magnitude", "tokens", "copy", "whole"]

_NAME = r"(?:\.(?!weight$)(?P<adapter>[^.]+))?"
_ENDINGS: tuple[tuple[Role, str], ...] = (
    ("A", rf"lora_A{_NAME}\.weight"),
    ("B", rf"lora_B{_NAME}\.weight"),
    ("embedding_A", rf"lora_embedding_A{_NAME}"),
    ("embedding_B", rf"lora_embedding_B{_NAME}"),
    ("magnitude", rf"lora_magnitude_vector{_NAME}(?:\.weight)?"),
    ("tokens", rf"(?:token_adapter\.)?trainable_tokens_delta{_NAME}"),
)
_ROLES = tuple(
    (role, re.compile(rf"(?P<module>.+?)(?P<inner>(?:\.base_layer)*)\.{ending}")) for role, ending in _ENDINGS
)
_MAX_NAME = 1000
_FOREIGN = re.compile(r"\.(?:lora_|trainable_tokens|token_adapter\b|original_module\b)")


@dataclass(frozen=True)
class Key:
    """One tensor of an adapter file.

    Attributes:
        text: its name in the file.
        role: what it is.
        module: the module it belongs to, as the trained model calls it; for ``copy`` and ``whole`` the tensor.
        depth: how many ``base_layer`` lie between the module and it: several parameters of one module nest.
    """

    text: str
    role: Role
    module: str
    depth: int = 0


def parse_keys(names: Iterable[str], file: Path) -> list[Key]:
    """Read the role of every key of an adapter file.

    Args:
        names: the keys.
        file: where they are, for messages.

    Raises:
        CheckpointError: it holds several adapters, or a key of a method that is not known here.
    """
    keys: list[Key] = []
    adapters: set[str] = set()
    for name in names:
        if len(name) > _MAX_NAME:  # the expressions below take time quadratic in it
            raise CheckpointError(f"{file}: a tensor's name has {len(name):,} characters; fetch the adapter again")
        key, adapter = _parse(name)
        if key.role == "whole" and _FOREIGN.search(name):
            raise CheckpointError(f"{file}: what {name!r} stands for is not known here; {merge_first(file.parent)}")
        keys.append(key)
        if key.role not in {"copy", "whole"}:
            adapters.add(adapter or "one without a name")
    if len(adapters) > 1:
        shown = ", ".join(sorted(adapters))
        raise CheckpointError(f"{file}: holds several adapters ({shown}); save the one you want to a folder of its own")
    return keys


def _parse(name: str) -> tuple[Key, str | None]:
    stem = name.removeprefix("base_model.model.")
    for role, pattern in _ROLES:
        match = pattern.fullmatch(stem)
        if match:
            return Key(name, role, match["module"], match["inner"].count("base_layer")), match["adapter"]
    if ".base_layer." in stem:
        return Key(name, "copy", stem.replace(".base_layer.", ".")), None
    return Key(name, "whole", stem), None
