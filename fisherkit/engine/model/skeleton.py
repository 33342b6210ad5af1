"""Skeleton of a causal language model without weights, and the names on both sides of its checkpoint.

The skeleton is transformers' own model on the meta device. Weights come and go block by block through transformers'
own loader (which also fuses experts and renames); nothing here knows an architecture.

Two vocabularies meet here: *parameters* are named as in ``model.named_parameters()``, *tensors* as in the checkpoint.
Everything that leaves the engine is keyed by tensors.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import conversion_mapping, core_model_loading
from transformers.modeling_utils import LoadStateDictConfig

from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.errors import CheckpointError, UnsupportedModelError, first_line


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


@dataclass(frozen=True)
class CheckpointNames:
    """Names on both sides of a checkpoint.

    Attributes:
        parameter_of: tensor name -> name of the (first) parameter or buffer that it feeds.
        converted: parameters whose values lie in other shapes or another order on disk, not just under another name.
        conversions: transformers' own, between the two sides.
    """

    parameter_of: dict[str, str]
    converted: frozenset[str]
    conversions: list[Any]


@dataclass
class Skeleton:
    """Model on the meta device, its decoder blocks, and the names on both sides.

    Attributes:
        model: transformers' causal language model; parameters on the meta device until loaded.
        dtype: what its floating parameters are computed in.
        index: the checkpoint, or None when only its config is known (dry runs).
        blocks: the decoder blocks themselves (also while stubs stand in for them in the model).
        lists: paths of the module lists that hold them, in order of the blocks, e.g. ``("model.layers",)``.
        decoder_path: path of the text model, e.g. ``model.language_model``.
        names: on both sides.
    """

    model: Any
    dtype: torch.dtype
    index: CheckpointIndex | None
    blocks: tuple[nn.Module, ...]
    lists: tuple[str, ...]
    decoder_path: str
    names: CheckpointNames

    @property
    def blocks_path(self) -> str:
        """Common path of all blocks, e.g. ``model.layers``."""
        parts = [path.split(".") for path in self.lists]
        common = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
        return ".".join(common)

    @cached_property
    def block_paths(self) -> tuple[str, ...]:
        """Path of each block, e.g. ``model.layers.0``."""
        return tuple(f"{path}.{number}" for path in self.lists for number in range(len(self.model.get_submodule(path))))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {path: number for number, path in enumerate(self.block_paths)}

    @cached_property
    def _block_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"((?:{'|'.join(map(re.escape, self.lists))})\.\d+)\.")

    def block_of(self, parameter: str) -> int | None:
        """Return the number of the block that a parameter lies in, None outside of the blocks."""
        match = self._block_pattern.match(parameter)
        return self._numbers[match[1]] if match else None

    def block_tensors(self, blocks: Iterable[int]) -> list[str]:
        """Return the names of the checkpoint tensors that the given blocks are loaded from."""
        wanted = set(blocks)
        return [name for name, parameter in self.names.parameter_of.items() if self.block_of(parameter) in wanted]

    def outer_tensors(self) -> list[str]:
        """Return the names of the tensors outside the blocks: embeddings, final norm, head.

        Projectors of pictures into the text are among them, for some models run them on text too; towers are not.
        """
        kept = self.model.state_dict().keys()
        there = {name: parameter for name, parameter in self.names.parameter_of.items() if parameter in kept}
        return [name for name, parameter in there.items() if self.block_of(parameter) is None]

    def is_text(self, parameter: str) -> bool:
        """Return True if a parameter belongs to the text model, not to a vision or audio tower beside it."""
        if not has_towers(self.model.config):
            return True
        head = self.model.get_output_embeddings()
        heads = [path for path, module in self.model.named_modules() if module is head] if head is not None else []
        return any(parameter.startswith(path + ".") for path in (self.decoder_path, *heads))

    def parameters(self, block: int | None) -> dict[str, nn.Parameter]:
        """Return the parameters of one block, or of the text model around the blocks (None), by their full names."""
        if block is not None:
            prefix = f"{self.block_paths[block]}."
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
        _drop_weights(self.blocks[block].modules())

    def unload_outer(self) -> None:
        """Drop what lies around the blocks in the same way."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        _drop_weights(module for module in self.model.modules() if id(module) not in inside)

    def check_tied(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if the checkpoint holds both of two tied tensors and they differ."""
        for one, other in self.tied.items():
            names = [name for parameter in (one, other) for name in self._sources.get(parameter, ())]
            held = [tensors[name] for name in names if name in tensors]
            if any(not torch.equal(held[0], tensor) for tensor in held[1:]):
                raise CheckpointError(
                    f"{self.index.path if self.index else 'checkpoint'}: {' and '.join(names)} are tied by config.json "
                    "but differ; set tie_word_embeddings to false there, or take the right checkpoint"
                )

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that share the memory of another: name -> name of the one that the checkpoint holds."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def tie(self) -> None:
        """Tie the weights that share memory; for after they are loaded."""
        self.model.tie_weights()

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
            if len(sources) == 1 and parameter not in self.names.converted:
                tensors[sources[0]] = value
            else:
                converted[parameter] = value
        if converted:
            self.model._weight_conversions = self.names.conversions
            try:
                reverted = core_model_loading.revert_weight_conversion(self.model, converted)
            except ValueError as error:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: transformers cannot turn {next(iter(converted))} into a tensor of "
                    f"the checkpoint ({first_line(error)})"
                ) from error
            tensors |= {self._on_disk(name): value for name, value in reverted.items()}
        return tensors

    def describe(self, parameters: Iterable[str], block: int | None) -> dict[str, tuple[TargetTensor, ...]]:
        """Return for each parameter the checkpoint tensors that it stands for, alone or with other parameters.

        Args:
            parameters: names.
            block: that all of them lie in, or None.
        """
        own = self.parameters(block)
        meta = {name: torch.empty(own[name].shape, device="meta") for name in parameters}
        # A tensor may be split into several parameters (fused q, k and v): its shape shows when all come together.
        shapes = {name: tuple(value.shape) for name, value in self.tensors_of(meta).items()}
        return {
            name: tuple(TargetTensor(tensor, shapes[tensor], block) for tensor in self.tensors_of({name: value}))
            for name, value in meta.items()
        }

    @cached_property
    def _sources(self) -> dict[str, list[str]]:
        sources: dict[str, list[str]] = defaultdict(list)
        for tensor, parameter in self.names.parameter_of.items():
            sources[parameter].append(tensor)
        return sources

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


def _drop_weights(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="meta")


def has_towers(config: Any) -> bool:
    """Return True if the config has parts beside the text model (vision, audio)."""
    return config.get_text_config() is not config
