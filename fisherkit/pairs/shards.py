"""Files of an output: how its tensors are divided among them, and what cannot be written."""

from collections.abc import Sequence

from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.checkpoint.writer import TensorSpec
from fisherkit.errors import CheckpointError


def plan_shards(index: CheckpointIndex, shard_bytes: int | None) -> list[tuple[str, Sequence[str]]]:
    """Divide an output into files: as the base is divided, under transformers' names, or by size.

    Args:
        index: BASE.
        shard_bytes: largest file, unless a single tensor is larger; None for the base's own division.

    Returns:
        File names, and the names of the tensors in each.
    """
    groups: list[list[str]] = []
    if shard_bytes is None:
        of = {file: [info.name for info in index.tensors.values() if info.file == file] for file in index.files}
        groups = [names for names in of.values() if names]
    else:
        room = 0
        for info in index.tensors.values():
            if not groups or info.nbytes > room:
                groups.append([])
                room = shard_bytes
            groups[-1].append(info.name)
            room -= info.nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{n:05d}-of-{len(groups):05d}.safetensors", names) for n, names in enumerate(groups, start=1)]


def refuse_unwritable(index: CheckpointIndex) -> None:
    """Raise CheckpointError for tensors of a type that cannot be written back."""
    for info in index.tensors.values():
        try:
            TensorSpec(info.name, info.dtype, info.shape)
        except ValueError as error:
            raise CheckpointError(f"{info.file}: {error}") from None
