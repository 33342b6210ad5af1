"""A model opened for a run: its config read, its skeleton built, and the checkpoint held against it."""

import torch

from fisherkit.checkpoint.hub import ModelSource
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.engine.model.build import build_skeleton
from fisherkit.engine.model.checks import check_all_taken, check_counts, folder_of
from fisherkit.engine.model.compute_dtype import choose_compute_dtype, shape_to_come
from fisherkit.engine.model.config import choose_dtype, read_config
from fisherkit.engine.model.device import check_dtype
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import CheckpointError, FisherkitError, first_line
from fisherkit.options import RunOptions
from fisherkit.progress import Say


def open_skeleton(
    source: ModelSource,
    index: CheckpointIndex | None,
    options: RunOptions,
    device: torch.device,
    say: Say,
    *,
    probe: bool = True,
) -> Skeleton:
    """Build the model without weights, and hold the checkpoint against it.

    Args:
        source: where its config.json is.
        index: its tensors; None where only the config is known (dry runs).
        options: the dtype to compute in, and whether code that ships with the model may run.
        device: to compute on.
        say: told where another dtype than the checkpoint's is computed in.
        probe: whether the device is tried: if it computes in the dtype, and for ``auto`` how fast; what another
            machine's does, nothing here tells.

    Raises:
        CheckpointError: the config cannot be read, makes no model, or belongs to another checkpoint.
        OptionError: the device does not compute in the dtype.
        UnsupportedModelError: no causal language model that can be run.
    """
    check_counts(source)
    try:
        config = read_config(source.path, trust_remote_code=options.trust_remote_code)
        dtype = choose_dtype(config, index, options.dtype)
        if options.dtype == "auto" and probe:
            tokens = min(options.tokens_per_batch, options.max_length)
            dtype, line = choose_compute_dtype(dtype, device, shape_to_come(config.get_text_config(), tokens))
            if line is not None:
                say(line)
        if probe:
            check_dtype(dtype, device)
        skeleton = build_skeleton(config, index, dtype, trust_remote_code=options.trust_remote_code)
    except FisherkitError:
        raise
    except Exception as error:  # transformers answers odd values in a config with whatever they lead to
        detail = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{folder_of(source) / 'config.json'}: transformers makes no model of it ({detail})"
        ) from error
    if index is not None:
        check_all_taken(source, skeleton)
    return skeleton
