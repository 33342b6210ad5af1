"""Which models must be kept in memory as a whole, because their blocks cannot be run one by one."""

import inspect

import torch

from fisherkit.checkpoint.atomic import size_text
from fisherkit.engine.model.build import shared_between_blocks
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import UnsupportedModelError
from fisherkit.options.extract import Engine


def why_resident(skeleton: Skeleton) -> str | None:
    """Return why the blocks of a model cannot be run one by one, as far as the skeleton tells; None if they can."""
    shared = shared_between_blocks(skeleton.blocks)
    if shared is not None:
        return f"its blocks share {shared}"
    return f"its blocks lie in {len(skeleton.lists)} lists" if len(skeleton.lists) > 1 else None


def check_resident(
    name: str,
    skeleton: Skeleton,
    device: torch.device,
    engine: Engine,
    reason: str,
    *,
    needed: int = 0,
    room: int | None = None,
) -> None:
    """Refuse to keep a model in memory where that was not wanted, or where it does not fit.

    Args:
        name: of the model, as the user wrote it.
        skeleton: of the model.
        device: that it would be kept on.
        engine: that was asked for.
        reason: why it cannot be streamed.
        needed: bytes with all that is kept beside the weights; the weights' own if that is more.
        room: bytes that it may take; all that are free by default.

    Raises:
        UnsupportedModelError: see above.
    """
    if engine == "stream":
        raise UnsupportedModelError(f"{name}: cannot be streamed: {reason}; try --engine auto")
    weights = weight_bytes(skeleton)
    room = available_bytes(device) if room is None else room
    if weights > room:
        raise UnsupportedModelError(
            f"{name}: cannot be streamed ({reason}), and its {size_text(weights)} do not fit the "
            f"{size_text(room)} of memory"
        )
    if needed > room:
        raise UnsupportedModelError(
            f"{name}: cannot be streamed ({reason}), and its weights with sums, gradients and activations need "
            f"{size_text(needed)} of the {size_text(room)} of memory; a smaller --group-size or --max-length helps"
        )


def weight_bytes(skeleton: Skeleton) -> int:
    """Return the bytes of all weights in the type that they are computed in."""
    return sum(weight.numel() * weight.element_size() for weight in skeleton.model.parameters())


def takes_token_types(skeleton: Skeleton) -> bool:
    """Return whether a model can be told which tokens are a prefix; see engine.sweep.feed."""
    return "token_type_ids" in inspect.signature(skeleton.model.forward).parameters


def leaks(name: str, skeleton: Skeleton) -> UnsupportedModelError:
    """Return the error for a model whose tokens see later ones."""
    return UnsupportedModelError(
        f"{name}: {skeleton.model.config.model_type} lets tokens see the ones after them, so that labels would leak; "
        "only causal language models can be measured (is_decoder in config.json makes one of some encoders)"
    )
