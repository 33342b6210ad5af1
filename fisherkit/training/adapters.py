"""Adapters of peft on the weights of a model: LoRA factors that a rule can hold, and kinds that none can.

Read off the modules and parameter names alone; peft itself is never imported.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fisherkit.checkpoint.names.spelling import spelling

_FACTOR = re.compile(
    r"(.*?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(?:\.weight)?"
)
# Parts of LoRA beside its factors that leave a held delta held: a bias of the output, and what AdaLoRA puts between B
# and A, a diagonal (lora_E) and a count (ranknum).
_HARMLESS = re.compile(r"lora_B\.[^.]+\.bias|lora_E\.[^.]+|ranknum\.[^.]+")
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+")  # of each other, in any order
_TOKENS = re.compile(r"\.token_adapter(?=\.)")  # peft's, around an embedding of which some rows are trained


def spelled(name: str) -> str:
    """Return the spelling of a parameter's name in a model under any number of wrappers."""
    return spelling(unwrapped(name))


def unwrapped(name: str) -> str:
    """Return a parameter's name without what DDP, torch.compile, FSDP and peft's trained tokens add to it."""
    return _TOKENS.sub("", _WRAPPERS.sub("", name))


@dataclass
class LoraAdapter:
    """LoRA factors of one weight under one adapter name; delta = s B A, transposed where the weight is [in, out].

    Attributes:
        module: name of the adapted module.
        a: [r, in].
        b: [out, r].
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

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """Return the factors that are there, A first."""
        return tuple(factor for factor in (self.a, self.b) if factor is not None)


@dataclass(frozen=True)
class OtherAdapter:
    """An adapter whose effect on a weight no rule can hold: LoHa, OFT, IA3, trained tokens, ...

    Attributes:
        kind: name of the adapter's package in peft (``loha``); of its class for adapters that are not peft's.
        parameters: what is trained of it on this weight.
    """

    kind: str
    parameters: tuple[nn.Parameter, ...]


@dataclass
class Adapters:
    """Adapters of a model by the spelling of the weight that they move.

    Attributes:
        lora: LoRA factors.
        others: adapters of every other kind.
        experts: spellings of modules whose fused experts carry LoRA.
        parameters: all LoRA factors and magnitudes by their names in the model.
    """

    lora: dict[str, list[LoraAdapter]] = field(default_factory=dict)
    others: dict[str, list[OtherAdapter]] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def read_adapters(model: nn.Module) -> Adapters:
    """Find the adapters of a model, wrapped or not."""
    found = Adapters()
    factors: dict[tuple[str, str], LoraAdapter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        match = _FACTOR.fullmatch(name)
        if match:
            found.parameters[name] = parameter
            _add_factor(factors.setdefault((match[1], match[3]), LoraAdapter(match[1])), match[2], parameter)
    modules = dict(model.named_modules())
    _place_lora(found, factors, modules)
    for name, module in modules.items():
        other = _other_adapter(module)
        for weight in _adapted_names(name, module) if other else ():
            assert other is not None
            found.others.setdefault(weight, []).append(other)
    return found


def _add_factor(adapter: LoraAdapter, kind: str, parameter: nn.Parameter) -> None:
    if kind == "lora_magnitude_vector":
        adapter.magnitude = parameter
    elif kind.endswith("A"):
        adapter.a = parameter
    else:
        adapter.b = parameter
    adapter.transposed = adapter.transposed or kind.startswith("lora_embedding")


def _place_lora(
    found: Adapters, factors: Mapping[tuple[str, str], LoraAdapter], modules: Mapping[str, nn.Module]
) -> None:
    configs: Mapping[str, Any] = next(
        (own for module in modules.values() if (own := getattr(module, "peft_config", None))), {}
    )
    for (path, label), adapter in factors.items():
        adapter.begun = str(getattr(configs.get(label), "init_lora_weights", ""))
        module = modules.get(path)
        if getattr(module, "parameter_name", None) is not None:  # LoRA on a bare parameter: fused experts
            found.experts.append(spelled(path))
            continue
        adapter.transposed = adapter.transposed or bool(getattr(module, "fan_in_fan_out", False))
        found.lora.setdefault(spelled(f"{path}.weight"), []).append(adapter)


def _other_adapter(module: nn.Module) -> OtherAdapter | None:
    """Return what a module trains beside the layer that it wraps, as far as it is no LoRA; None where nothing."""
    if not isinstance(getattr(module, "base_layer", None), nn.Module):
        return None
    own = tuple(
        parameter
        for name, parameter in module.named_parameters()
        if not name.startswith("base_layer.") and not _FACTOR.fullmatch(f"x.{name}") and not _HARMLESS.fullmatch(name)
    )
    origin = type(module).__module__.split(".")
    kind = origin[2] if origin[:2] == ["peft", "tuners"] and len(origin) > 2 else type(module).__name__
    return OtherAdapter(kind, own) if own else None


def _adapted_names(name: str, module: nn.Module) -> Iterator[str]:
    """Spellings of all that an adapter wraps: some kinds move the bias as well."""
    for parameter, _ in module.named_parameters(prefix=name, remove_duplicate=False):
        if parameter.startswith(f"{name}.base_layer."):
            yield spelled(parameter)
