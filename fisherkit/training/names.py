"""From the names in a mask to the parameters of a model that is being trained.

A mask is keyed by checkpoint names; a model that trains may be wrapped (``module.``, ``_orig_mod.``, ...), carry
adapters (``base_model.model.``, ``.base_layer.``), lie under another class's prefix, and hold experts in one tensor
that the checkpoint holds apart. Names are compared in the spelling of ``names.spelling``; renames that it does not
know are asked of transformers' own conversion.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fisherkit.checkpoint.names.spelling import Piece, pieces, spelling
from fisherkit.errors import TrainingError

DEEPSPEED = (
    "DeepSpeed keeps weights of its own, in flat pieces, and writes them over the model's at every step, so no mask "
    "holds: train with FSDP2 or DDP, or apply the mask after training with `fisherkit merge --mask`"
)
FSDP1 = (
    "FSDP1 trains flat pieces in which no weight has a name or a shape, so no mask can be applied: "
    "use FSDP2 (fsdp_version: 2), or apply the mask after training with `fisherkit merge --mask`"
)
_FACTOR = re.compile(
    r"(.*?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(?:\.weight)?"
)
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+")  # of each other, in any order
_FROZEN_COPY = ".original_module."


def spelled(name: str) -> str:
    """The spelling of a parameter's name in a model under any number of wrappers."""
    return spelling(_WRAPPERS.sub("", name))


@dataclass(frozen=True)
class Target:
    """Where a weight of the mask lives: a parameter, or the piece of it that is one expert's."""

    name: str
    parameter: nn.Parameter
    piece: Piece

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.piece.shape_in(tuple(self.parameter.shape))

    def part(self, tensor: Tensor) -> Tensor:
        """The view of a tensor shaped like the parameter (or with size 1 at its last axis) that is this weight."""
        return tensor if self.piece.expert is None else tensor[self.piece.expert, self.piece.start : self.piece.stop]


@dataclass
class Adapter:
    """The LoRA factors of one weight under one adapter name; delta = s B A, transposed where the weight is [in, out].

    Attributes:
        module: name of the adapted module.
        a: [r, in]; b: [out, r].
        transposed: the weight is stored as [in, out] (Conv1D, embeddings).
        magnitude: DoRA's, which rescales rows.
        begun: peft's ``init_lora_weights``; a name where B A did not begin as nothing.
    """

    module: str
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    transposed: bool = False
    magnitude: nn.Parameter | None = None
    begun: str = ""

    @property
    def shape(self) -> tuple[int, int] | None:
        """Shape of the weight as it is stored; None while a factor is missing."""
        if self.a is None or self.b is None:
            return None
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape


@dataclass
class Names:
    """The parameters of a model by the spelling of what they are, and the adapters on them.

    Attributes:
        parameters: name in the model -> parameter; a tied parameter under each of its names.
        adapters: spelling of a weight -> its adapters.
        experts: spellings of modules whose fused experts carry adapters.
        targets: spelling of a weight -> where it lives; fused experts whole and one by one.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    adapters: dict[str, list[Adapter]] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    targets: dict[str, Target] = field(default_factory=dict)

    def find(self, name: str) -> Target | None:
        """Where the weight of that checkpoint name lives; None if the model has no such parameter."""
        return self.targets.get(name) or self.targets.get(spelled(name))

    def adapters_of(self, target: Target) -> list[Adapter]:
        """The adapters on a weight."""
        return self.adapters.get(target.piece.spelling, [])


def read_names(model: nn.Module) -> Names:
    """Look through a model, wrapped or not.

    Raises:
        TrainingError: its parameters are not there to be found (DeepSpeed, FSDP1).
    """
    _refuse_wrappers(model)
    found = Names()
    adapters: dict[tuple[str, str], Adapter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        match = _FACTOR.fullmatch(name)
        if match:
            _add_factor(adapters.setdefault((match[1], match[3]), Adapter(match[1])), match[2], parameter)
        elif _FROZEN_COPY not in name:
            found.parameters[name] = parameter
    configs: dict[str, Any] = next(
        (own for module in model.modules() if (own := getattr(module, "peft_config", None))), {}
    )
    for (_, label), adapter in adapters.items():
        adapter.begun = str(getattr(configs.get(label), "init_lora_weights", ""))
    _place_adapters(found, adapters, dict(model.named_modules()))
    found.targets = _targets(found.parameters)
    return found


def find_all(names: Names, wanted: Iterable[str], model: nn.Module) -> dict[str, Target]:
    """Where every weight of a mask lives; a name that is found nowhere is left out.

    Names that are spelled in none of the known ways are renamed as transformers does when it loads this model.
    """
    found = {name: target for name in wanted if (target := names.find(name))}
    missing = [name for name in wanted if name not in found]
    for name, renamed in _as_loaded(missing, model) if missing else ():
        target = names.find(renamed)
        if target is not None:
            found[name] = target
    return found


def _targets(parameters: dict[str, nn.Parameter]) -> dict[str, Target]:
    """By spelling, fused experts piece by piece and whole; a spelling that two parameters share is nobody's."""
    owners: dict[str, list[Target]] = defaultdict(list)
    bare = {_WRAPPERS.sub("", name): name for name in parameters}
    for short, cut in pieces({short: tuple(parameters[name].shape) for short, name in bare.items()}).items():
        name = bare[short]
        whole = Piece(spelled(name), None, 0, 0)
        for piece in cut if cut[0].expert is None else (whole, *cut):
            owners[piece.spelling].append(Target(name, parameters[name], piece))
    return {key: own[0] for key, own in owners.items() if len({id(target.parameter) for target in own}) == 1}


def _add_factor(adapter: Adapter, kind: str, parameter: nn.Parameter) -> None:
    if kind == "lora_magnitude_vector":
        adapter.magnitude = parameter
    elif kind.endswith("A"):
        adapter.a = parameter
    else:
        adapter.b = parameter
    adapter.transposed = adapter.transposed or kind.startswith("lora_embedding")


def _place_adapters(found: Names, adapters: dict[tuple[str, str], Adapter], modules: dict[str, nn.Module]) -> None:
    for (path, _), adapter in adapters.items():
        module = modules.get(path)
        if getattr(module, "parameter_name", None) is not None:  # peft's adapter on a bare parameter: fused experts
            found.experts.append(spelled(path))
            continue
        adapter.transposed = adapter.transposed or bool(getattr(module, "fan_in_fan_out", False))
        found.adapters.setdefault(spelled(f"{path}.weight"), []).append(adapter)


def _as_loaded(names: Iterable[str], model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a checkpoint, each with what transformers' renaming makes of it."""
    from transformers import PreTrainedModel, conversion_mapping, core_model_loading

    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return
    mapping = conversion_mapping.get_model_conversion_mapping(inner)
    renamings = [entry for entry in mapping if not isinstance(entry, core_model_loading.WeightConverter)]
    for name in names:
        yield name, core_model_loading.rename_source_key(name, renamings, [])[0]


def _refuse_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        origin = type(module).__module__
        if origin.startswith("deepspeed"):
            raise TrainingError(DEEPSPEED)
        if origin.startswith("torch.distributed.fsdp") and type(module).__name__ == "FullyShardedDataParallel":
            raise TrainingError(FSDP1)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise TrainingError(DEEPSPEED)
