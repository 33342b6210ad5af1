"""Finds the parameters of a model in training that the names in a mask mean.

A mask is keyed by checkpoint names; a model that trains may be wrapped (``module.``, ``_orig_mod.``, ...), carry
adapters (``base_model.model.``, ``.base_layer.``), lie under another class's prefix, and hold experts in one tensor
that the checkpoint holds apart. Names are compared in the spelling of ``names.spelling``; renames that it does not
know are asked of transformers' own conversion.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from fisherkit.checkpoint.names.spelling import Piece, pieces
from fisherkit.errors import CheckpointError, TrainingError
from fisherkit.training.adapters import Adapters, LoraAdapter, OtherAdapter, read_adapters, spelled, unwrapped

DEEPSPEED = (
    "DeepSpeed keeps weights of its own, in flat pieces, and writes them over the model's at every step, so no mask "
    "holds: train with FSDP2 or DDP, or apply the mask after training with `fisherkit merge --mask`"
)
FSDP1 = (
    "FSDP1 trains flat pieces in which no weight has a name or a shape, so no mask can be applied: "
    "use FSDP2 (fsdp_version: 2), or apply the mask after training with `fisherkit merge --mask`"
)
_FROZEN_COPY = ".original_module."


@dataclass(frozen=True)
class Target:
    """Place of a weight of the mask: a parameter, or the piece of it that is one expert's."""

    name: str
    parameter: nn.Parameter
    piece: Piece

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight itself, not of the parameter that it may be a piece of."""
        return self.piece.shape_in(tuple(self.parameter.shape))

    def part(self, tensor: Tensor) -> Tensor:
        """Return this weight's view of a tensor shaped like the parameter, or with size 1 at its last axis."""
        return tensor if self.piece.expert is None else tensor[self.piece.expert, self.piece.start : self.piece.stop]


@dataclass
class Names:
    """Parameters of a model by the spelling of what they are, and the adapters on them.

    Attributes:
        targets: spelling of a weight -> where it lives; fused experts whole and one by one.
        adapters: what peft put on the weights.
    """

    targets: dict[str, Target] = field(default_factory=dict)
    adapters: Adapters = field(default_factory=Adapters)

    def find(self, name: str) -> Target | None:
        """Return where the weight of that checkpoint name lives; None if the model has no such parameter."""
        return self.targets.get(name) or self.targets.get(spelled(name))

    def lora_of(self, target: Target) -> list[LoraAdapter]:
        """Return the LoRA adapters on a weight."""
        return self.adapters.lora.get(target.piece.spelling, [])

    def others_of(self, target: Target) -> list[OtherAdapter]:
        """Return the adapters of other kinds on a weight, or on the parameter that it is an expert of."""
        keys = dict.fromkeys((target.piece.spelling, spelled(target.name)))
        return [adapter for key in keys for adapter in self.adapters.others.get(key, [])]

    def has_expert_lora(self, target: Target) -> bool:
        """Return whether the fused experts that a weight belongs to carry LoRA."""
        return any(spelled(target.name).startswith(f"{module}.") for module in self.adapters.experts)


def read_names(model: nn.Module) -> Names:
    """Look through a model, wrapped or not.

    Raises:
        TrainingError: its parameters are not there to be found (DeepSpeed, FSDP1).
    """
    _refuse_wrappers(model)
    adapters = read_adapters(model)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in adapters.parameters and _FROZEN_COPY not in name
    }
    return Names(_targets(parameters), adapters)


def find_weights(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by the names that a checkpoint has for them.

    Args:
        model: wrapped or not, with adapters or without.
        names: of weights as masks and Fishers have them.

    Raises:
        CheckpointError: a weight is not in this model, or is one expert of a parameter that holds all of them.
    """
    names = list(names)
    found = find_all(read_names(model), names, model)
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(f"{len(missing)} of {len(names)} weights are not in this model, the first {missing[0]!r}")
    for name, target in found.items():
        if target.piece.expert is not None:
            raise CheckpointError(f"{name} is no parameter of its own in this model: a part of {target.name}")
    return {name: found[name].parameter for name in names}


def find_all(names: Names, wanted: Iterable[str], model: nn.Module) -> dict[str, Target]:
    """Return where every weight of a mask lives; a name that is found nowhere is left out.

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
    """Return targets by spelling, fused experts in pieces and whole; none for a spelling that two parameters share."""
    owners: dict[str, list[Target]] = defaultdict(list)
    bare = {unwrapped(name): name for name in parameters}
    for short, cut in pieces({short: tuple(parameters[name].shape) for short, name in bare.items()}).items():
        name = bare[short]
        whole = Piece(spelled(name), None, 0, 0)
        for piece in cut if cut[0].expert is None else (whole, *cut):
            owners[piece.spelling].append(Target(name, parameters[name], piece))
    return {key: own[0] for key, own in owners.items() if len({id(target.parameter) for target in own}) == 1}


def _as_loaded(names: Iterable[str], model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield names of a checkpoint, each with what transformers' renaming makes of it."""
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
