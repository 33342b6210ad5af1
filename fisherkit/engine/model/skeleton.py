"""Skeleton of a causal language model without weights, and the names on both sides of its checkpoint.

The skeleton is transformers' own model on the meta device. Weights come and go block by block through transformers'
own loader (which also fuses experts and renames); nothing here knows an architecture.

Two vocabularies meet here: *parameters* are named as in ``model.named_parameters()``, *tensors* as in the checkpoint.
Everything that leaves the engine is keyed by tensors.
"""

import contextlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import conversion_mapping, core_model_loading
from transformers.modeling_utils import LoadStateDictConfig

from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.engine.model.config import refuse_quantised
from fisherkit.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class TargetTensor:
    """A tensor of the Fisher: its checkpoint name, the shape of the weight, and the block it lies in (or None)."""

    name: str
    shape: tuple[int, ...]
    block: int | None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()


@dataclass
class Skeleton:
    """Model on the meta device, its decoder blocks, and the names on both sides.

    Attributes:
        model: transformers' causal language model; parameters on the meta device until loaded.
        dtype: what its floating parameters are computed in.
        index: the checkpoint, or None when only its config is known (dry runs).
        blocks: the decoder blocks themselves (also while stubs stand in for them in the model).
        blocks_path: where they sit in the model, e.g. ``model.layers``.
        parameter_of: tensor name -> name of the (first) parameter it feeds.
    """

    model: Any
    dtype: torch.dtype
    index: CheckpointIndex | None
    blocks: tuple[nn.Module, ...]
    blocks_path: str
    decoder_path: str
    parameter_of: dict[str, str]
    conversions: list[Any]

    def block_of(self, parameter: str) -> int | None:
        """Return the number of the block that a parameter lies in, None outside of the blocks."""
        match = re.match(re.escape(self.blocks_path) + r"\.(\d+)\.", parameter)
        return int(match[1]) if match else None

    def block_tensors(self, blocks: Iterable[int]) -> list[str]:
        """Return the names of the checkpoint tensors that the given blocks are loaded from."""
        wanted = set(blocks)
        return [name for name, parameter in self.parameter_of.items() if self.block_of(parameter) in wanted]

    def outer_tensors(self) -> list[str]:
        """Return the names of the tensors of the text model outside its blocks: embeddings, final norm, head."""
        return [
            name
            for name, parameter in self.parameter_of.items()
            if self.block_of(parameter) is None and self.is_text(parameter)
        ]

    def is_text(self, parameter: str) -> bool:
        """Return True if a parameter belongs to the text model, not to a vision or audio tower beside it."""
        if not _has_towers(self.model.config):
            return True
        head = self.model.get_output_embeddings()
        heads = [path for path, module in self.model.named_modules() if module is head] if head is not None else []
        return any(parameter.startswith(path + ".") for path in (self.decoder_path, *heads))

    def parameters(self, block: int | None) -> dict[str, nn.Parameter]:
        """Return the parameters of one block, or of the text model around the blocks (None), by their full names."""
        if block is not None:
            prefix = f"{self.blocks_path}.{block}."
            return {prefix + name: parameter for name, parameter in self.blocks[block].named_parameters()}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if self.block_of(name) is None and self.is_text(name)
        }

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Put checkpoint tensors into the model, converted, in its dtype, on ``device``, frozen.

        Args:
            tensors: by checkpoint name, of any float dtype; whole sets, where several make one parameter.
            device: of the parameters.

        Raises:
            CheckpointError: a shape does not fit the config, or a conversion failed.
        """
        arguments: dict[str, Any] = {}
        if "tp_plan" in inspect.signature(core_model_loading.convert_and_load_state_dict_in_model).parameters:
            arguments["tp_plan"] = None  # transformers 5.8 asks for it
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=conversion_mapping.get_model_conversion_mapping(self.model),
            device_map={"": device},
        )
        info, _ = core_model_loading.convert_and_load_state_dict_in_model(
            self.model, dict(tensors), config, **arguments
        )
        for name, found, expected in info.mismatched_keys:
            raise CheckpointError(
                f"{self._where(name)}: shape {list(found)}, but config.json makes it {list(expected)}; "
                "the config belongs to another model"
            )
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))
            raise CheckpointError(f"{self._where(name)}: cannot be converted: {str(reason).splitlines()[0]}")
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def unload(self, block: int) -> None:
        """Drop a block's parameters and persistent buffers; computed buffers, which no checkpoint holds, stay."""
        for module in self.blocks[block].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = torch.empty_like(buffer, device="meta")

    def check_tied(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if the checkpoint holds both of two tied tensors and they differ."""
        ties: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        for one, other in ties.items():
            names = [name for parameter in (one, other) for name in self._sources.get(parameter, ())]
            held = [tensors[name] for name in names if name in tensors]
            if any(not torch.equal(held[0], tensor) for tensor in held[1:]):
                raise CheckpointError(
                    f"{self.index.path if self.index else 'checkpoint'}: {' and '.join(names)} are tied by config.json "
                    "but differ; set tie_word_embeddings to false there, or take the right checkpoint"
                )

    def check_loaded(self, block: int | None) -> None:
        """Raise CheckpointError if a parameter is still on the meta device: the checkpoint lacks it."""
        for name, parameter in self.parameters(block).items():
            if parameter.is_meta:
                raise CheckpointError(self._incomplete(name))

    def tensors_of(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn values per parameter into values per checkpoint tensor: fused experts are split, prefixes restored.

        Args:
            values: by parameter name, shaped like the parameter; meta tensors do.
        """
        tensors, converted = {}, {}
        for parameter, value in values.items():
            sources = self._sources.get(parameter, ())
            if len(sources) == 1 and self._shape_on_disk(sources[0]) == tuple(value.shape):
                tensors[sources[0]] = value
            else:
                converted[parameter] = value
        if converted:
            self.model._weight_conversions = self.conversions
            for name, value in core_model_loading.revert_weight_conversion(self.model, converted).items():
                tensors[self._on_disk(name)] = value
        return tensors

    def describe(self, parameters: Iterable[str], block: int | None) -> dict[str, tuple[TargetTensor, ...]]:
        """Return for each parameter the checkpoint tensors that it stands for.

        Args:
            parameters: names.
            block: that all of them lie in, or None.
        """
        own = self.parameters(block)
        described = {}
        for name in parameters:
            meta = {name: torch.empty(own[name].shape, device="meta")}
            described[name] = tuple(
                TargetTensor(tensor, tuple(value.shape), block) for tensor, value in self.tensors_of(meta).items()
            )
        return described

    @cached_property
    def _sources(self) -> dict[str, list[str]]:
        sources: dict[str, list[str]] = defaultdict(list)
        for tensor, parameter in self.parameter_of.items():
            sources[parameter].append(tensor)
        return sources

    def _shape_on_disk(self, tensor: str) -> tuple[int, ...] | None:
        return self.index.tensors[tensor].shape if self.index is not None else None

    def _on_disk(self, name: str) -> str:
        if self.index is None or name in self.index.tensors:
            return name
        prefix = f"{self.model.base_model_prefix}."
        for candidate in (name.removeprefix(prefix), prefix + name):
            if candidate in self.index.tensors:
                return candidate
        raise CheckpointError(self._incomplete(name))

    def _incomplete(self, parameter: str) -> str:
        where = self.index.path if self.index else "checkpoint"
        return (
            f"{where}: no tensor for the parameter {parameter}; "
            "the checkpoint is incomplete or its config.json belongs to another model"
        )

    def _where(self, name: str) -> str:
        sources = self._sources.get(name, [name])
        known = self.index is not None and sources[0] in self.index.tensors
        return f"{self.index.tensors[sources[0]].file}: {sources[0]}" if known and self.index else name


def build_skeleton(
    config: Any, index: CheckpointIndex | None, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Skeleton:
    """Build the model on the meta device and find its decoder blocks.

    Raises:
        UnsupportedModelError: not a causal language model of transformers, or no single list of blocks in it.
    """
    transformers.utils.logging.disable_progress_bar()
    if index is not None:
        refuse_quantised(index)
    model = _model_on_meta(config, dtype, trust_remote_code)
    model.eval()
    decoder = model.get_decoder()
    decoder_path = next((path for path, module in model.named_modules() if module is decoder), "")
    path, blocks = _find_blocks(model, decoder, config)
    parameter_of, conversions = _map_names(model, index)
    _build_computed_buffers(model)
    return Skeleton(model, dtype, index, tuple(blocks), path, decoder_path, parameter_of, conversions)


def _model_on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    for auto in autos:
        if type(config) in auto._model_mapping or (trust_remote_code and auto is autos[0]):
            with torch.device("meta"):
                return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    raise UnsupportedModelError(
        f"{config.model_type!r} is no causal language model of transformers {transformers.__version__}"
        + ("; --trust-remote-code runs the code that ships with it" if getattr(config, "auto_map", None) else "")
    )


def _find_blocks(model: Any, decoder: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """Find the shallowest ModuleList of the text model with as many members as the config has layers."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and any(child is module for child in decoder.modules())
    ]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__}: no list of {count} decoder blocks was found in it")
    return min(lists, key=lambda found: found[0].count("."))


def _map_names(model: Any, index: CheckpointIndex | None) -> tuple[dict[str, str], list[Any]]:
    if index is None:
        conversions = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
        return {}, [c for c in conversions if not isinstance(c, getattr(core_model_loading, "PrefixChange", ()))]
    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if not isinstance(entry, core_model_loading.WeightConverter)]
    converters = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightConverter)]
    state = model.state_dict()
    names = {}
    for tensor in index.tensors:
        name, _ = core_model_loading.rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor in state:
            name = tensor
        if name in state:
            names[tensor] = name
    used = [entry for entry in mapping if not hasattr(entry, "was_used") or entry.was_used()]
    return names, used


def _build_computed_buffers(model: Any) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, causal masks) are computed off the meta device."""
    for module in model.modules():
        computed = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if computed:
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            with torch.no_grad(), contextlib.suppress(NotImplementedError):
                model._init_weights(module)


def _has_towers(config: Any) -> bool:
    return config.get_text_config() is not config


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
