"""Build the skeleton of a model from its config: on the meta device, without weights and without towers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import conversion_mapping, core_model_loading

from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.engine.model.buffers import compute_buffers
from fisherkit.engine.model.config import refuse_quantised
from fisherkit.engine.model.skeleton import CheckpointNames, Skeleton, has_towers
from fisherkit.errors import UnsupportedModelError, first_line


def build_skeleton(
    config: Any, index: CheckpointIndex | None, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Skeleton:
    """Build the model on the meta device and find its decoder blocks.

    Args:
        config: of transformers.
        index: the checkpoint, or None when only its config is known.
        dtype: that floating parameters are computed in.
        trust_remote_code: run Python code that ships with the checkpoint.

    Raises:
        UnsupportedModelError: not a causal language model of transformers, one without decoder blocks, or one with
            buffers that cannot be computed.
    """
    transformers.utils.logging.disable_progress_bar()
    if index is not None:
        refuse_quantised(index)
    for model in _models_on_meta(config, dtype, trust_remote_code):
        skeleton = _skeleton(model, config, index, dtype)
        if index is None or skeleton.block_tensors([0]):
            break
    held = None if index is None else frozenset(skeleton.names.parameter_of.values())
    compute_buffers(skeleton.model, held, skeleton.is_text)
    return skeleton


def _skeleton(model: Any, config: Any, index: CheckpointIndex | None, dtype: torch.dtype) -> Skeleton:
    model.eval()
    decoder = model.get_decoder()
    decoder_path = next((path for path, module in model.named_modules() if module is decoder), "")
    lists = find_lists(model, decoder, config)
    blocks = tuple(block for path in lists for block in model.get_submodule(path))
    names = _map_names(model, index)
    _drop_towers(model, decoder)
    return Skeleton(model, dtype, index, blocks, lists, decoder_path, names)


def _models_on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Iterator[Any]:
    """Yield the model of the text alone, then the one with towers: some have both, and a checkpoint fits one."""
    known = False
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    for auto in autos:
        if type(config) in auto._model_mapping or (trust_remote_code and auto is autos[0]):
            try:
                with torch.device("meta"), missing_towers():
                    model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            except (AttributeError, ImportError, TypeError, ValueError) as error:
                raise UnsupportedModelError(
                    f"{config.model_type}: transformers {transformers.__version__} cannot make this model from its "
                    f"config ({first_line(error)})"
                ) from error
            known = True
            yield model
    if known:
        return
    raise UnsupportedModelError(
        f"{config.model_type!r} is no causal language model of transformers {transformers.__version__}"
        + ("; --trust-remote-code runs the code that ships with it" if getattr(config, "auto_map", None) else "")
    )


class _MissingTower(nn.Module):
    """Stands in for a tower whose libraries (timm, PIL) are not installed; only its config can be read."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


@contextmanager
def missing_towers() -> Iterator[None]:
    """Let models be built without the libraries that only a vision or audio tower needs: no tower is ever run."""
    plain: Callable[..., Any] = transformers.AutoModel.from_config

    def from_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(config, *args, **kwargs)
        except ImportError:
            return _MissingTower(config)

    with mock.patch.object(transformers.AutoModel, "from_config", from_config):
        yield


def _drop_towers(model: Any, decoder: nn.Module) -> None:
    """Take the parameters and buffers of vision and audio towers out of the model.

    They are neither loaded nor run. Left on the meta device, they would be what ``model.device`` says.
    """
    if not has_towers(model.config):
        return
    text = [module for module in (decoder, model.get_output_embeddings()) if module is not None]
    inside = {id(part) for part in decoder.modules()}
    for module in model.modules():
        whole = {id(part) for part in module.modules()}
        is_own_model = isinstance(module, transformers.PreTrainedModel | _MissingTower)
        if is_own_model and id(module) not in inside and not any(id(part) in whole for part in text):
            for part in module.modules():
                part._parameters.update(dict.fromkeys(part._parameters))
                part._buffers.update(dict.fromkeys(part._buffers))


def find_lists(model: Any, decoder: nn.Module, config: Any) -> tuple[str, ...]:
    """Return the paths of the module lists that hold the decoder blocks.

    That is the shallowest list of the text model with as many members as the config has layers. Where there is none,
    because layers are counted in another way or lie in several stacks, it is every outermost list of modules with
    matrices.

    Raises:
        UnsupportedModelError: no such list.
    """
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    for root in (decoder, model):  # some models call their head ``decoder``
        inside = {id(module) for module in root.modules()}
        lists = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and id(module) in inside and _has_matrices(module)
        }
        counted = [path for path, module in lists.items() if len(module) == count]
        if counted:
            return (min(counted, key=lambda path: path.count(".")),)
        outermost = tuple(path for path in lists if not any(path.startswith(f"{other}.") for other in lists))
        if outermost:
            return outermost
    raise UnsupportedModelError(f"{type(model).__name__}: no list of {count} decoder blocks was found in it")


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _map_names(model: Any, index: CheckpointIndex | None) -> CheckpointNames:
    if index is None:
        conversions = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
        prefix_changes = getattr(core_model_loading, "PrefixChange", ())
        return CheckpointNames({}, frozenset(), [c for c in conversions if not isinstance(c, prefix_changes)])
    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if not isinstance(entry, core_model_loading.WeightConverter)]
    converters = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightConverter)]
    state = model.state_dict()
    parameter_of, converted = {}, set()
    for tensor in index.tensors:
        name, pattern = core_model_loading.rename_source_key(
            tensor, renamings, converters, model.base_model_prefix, state
        )
        if name not in state and tensor in state:
            name = tensor
        if name in state:
            parameter_of[tensor] = name
            if pattern is not None:
                converted.add(name)
    used = [entry for entry in mapping if not hasattr(entry, "was_used") or entry.was_used()]
    return CheckpointNames(parameter_of, frozenset(converted), used)


def blocks_in_groups(count: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Cut block numbers 0..count-1 into consecutive groups of ``size``; the last may be smaller."""
    return tuple(tuple(range(start, min(start + size, count))) for start in range(0, count, size))


def shared_between_blocks(blocks: Sequence[nn.Module]) -> str | None:
    """Return the name of a parameter that two blocks share, None if there is none."""
    owner: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owner.setdefault(id(parameter), number) != number:
                return name
    return None
