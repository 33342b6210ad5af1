"""A PEFT adapter as the tuned side of a pair: what its base's tensors become, read without peft and without torch.

Reads LoRA as peft 0.21 writes it: rank-stabilised, with patterns of ranks and scales, DoRA, on embeddings, on fused
experts; tensors trained whole and rows of trainable tokens. Values equal those of ``merge_and_unload`` in float32.
Everything else is refused with the lines that merge it; so is an adapter of which anything would go unused.
"""

import hashlib
import re
from pathlib import Path, PurePath
from types import TracebackType
from typing import Self

import numpy as np

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import CheckpointIndex, open_index
from fisherkit.checkpoint.lora.base_weights import BaseWeights
from fisherkit.checkpoint.lora.config import CONFIG_NAME, AdapterConfig
from fisherkit.checkpoint.lora.keys import parse_keys
from fisherkit.checkpoint.lora.plan import AdapterPlan
from fisherkit.checkpoint.lora.updates import Factors
from fisherkit.errors import CheckpointError
from fisherkit.floats import FLOATING, STORED, Floats, widen

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_BLOCK_ELEMENTS = 1 << 20


def is_adapter(path: Path) -> bool:
    """Return whether ``path`` is a folder that peft saved an adapter to."""
    return (Path(path) / CONFIG_NAME).is_file()


class Adapter:
    """An adapter, opened for a base checkpoint; made by ``open``. Any number of threads may ask at once.

    Attributes:
        touched: names of the base's tensors that it changes, in the base's order.
        notes: what the reader of a report should know, one sentence each.
        rank: the largest inner size of its factors; None if it has none.
        base_model: what it was trained on, as it was called then; None if it does not say.
    """

    def __init__(
        self, folder: Path, reader: ArrayReader, plan: AdapterPlan, config: AdapterConfig, base: CheckpointIndex
    ) -> None:
        self._folder = folder
        self._reader = reader
        self._factors = Factors(reader)
        self._updates = plan.updates
        self.touched = tuple(name for name in base.tensors if name in plan.updates)
        self.notes = (*_other_base(config, base.path), *plan.notes)
        self.rank = max(plan.ranks, default=None)
        self.base_model = config.base_model

    @classmethod
    def open(cls, folder: Path, base: CheckpointIndex) -> Self:
        """Open the adapter in a folder, and find the place of everything in it.

        All its tensors are read once, to see that they are finite.

        Args:
            folder: as peft saved it.
            base: the checkpoint that it is put on.

        Raises:
            CheckpointError: files missing or damaged; a kind of adapter that peft must merge; a tensor that matches
                no weight of the base, does not fit it, or holds NaN or infinity.
        """
        folder = Path(folder)
        config = AdapterConfig.read(folder)
        index = open_index(_weights(folder))
        keys = parse_keys(index.tensors, index.path)
        reader = ArrayReader(index)
        try:
            for name in index.tensors:
                _check_values(reader, name)
            plan = AdapterPlan(keys, config, BaseWeights(base), Factors(reader))
            return cls(folder, reader, plan, config, base)
        except BaseException:
            reader.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def tuned(self, name: str, base: Floats) -> Floats:
        """Return the tuned values of tensor ``name``, as a fresh array of the base's shape.

        Args:
            name: the tensor, as the base calls it; one that is not touched comes back as it is.
            base: all its values, float32; not changed.

        Raises:
            CheckpointError: the adapter's file cannot be read any more.
        """
        return self.apply(name, np.array(base, dtype=np.float32, order="C"))

    def apply(self, name: str, weight: Floats) -> Floats:
        """Change the values of tensor ``name`` in place, and return them; ``weight`` is float32 and C-contiguous.

        Args:
            name: the tensor, as the base calls it.
            weight: all its values, changed in place.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            for update in self._updates.get(name, ()):
                update.apply(weight, self._factors)
        return weight

    def fingerprint(self) -> str:
        """Changes when its tensors or its settings do."""
        settings = hashlib.sha256((self._folder / CONFIG_NAME).read_bytes()).hexdigest()
        return f"{self._reader.index.fingerprint()} {settings}"

    def close(self) -> None:
        """Close the adapter's file; nothing can be asked afterwards."""
        self._reader.__exit__(None, None, None)


def _weights(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: has {CONFIG_NAME} but no {_FILES[0]}; fetch the adapter again")


def _check_values(reader: ArrayReader, name: str) -> None:
    info = reader.info(name)
    if info.dtype not in FLOATING:
        raise CheckpointError(f"{info.file}: {name!r} is stored as {info.dtype}, which is no type to compute with")
    if not info.numel:
        raise CheckpointError(
            f"{info.file}: {name!r} is empty, as one of several processes saves it; gather the shards and save again"
        )
    block = np.empty(min(info.numel, _BLOCK_ELEMENTS), STORED[info.dtype])
    for start in range(0, info.numel, _BLOCK_ELEMENTS):
        part = block[: info.numel - start]
        reader.read_into(name, part, start)
        if not np.isfinite(widen(part, info.dtype)).all():
            raise CheckpointError(f"{info.file}: {name!r} holds NaN or infinity; the training run went wrong")


def _other_base(config: AdapterConfig, base: Path) -> tuple[str, ...]:
    """A note if the adapter says that it was trained on something else."""
    said, parts = config.base_model, Path(base).absolute().parts
    if said is None:
        return ()
    cached = f"models--{said.replace('/', '--')}".lower()
    same = {PurePath(said).name.lower(), cached} & {part.lower() for part in parts}
    if not same:
        return (f"the adapter was trained on {said}, and BASE is {base}: make sure that they are the same",)
    commit = config.revision or ""
    if cached in {part.lower() for part in parts} and re.fullmatch(r"[0-9a-f]{40}", commit) and commit not in parts:
        return (f"the adapter was trained on commit {commit} of {said}, and BASE is {base}",)
    return ()
