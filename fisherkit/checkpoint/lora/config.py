"""Settings of a LoRA adapter from `adapter_config.json`; refuses what cannot be read without peft.

Only what changes the merged weights is kept. Anything that would make them differ from plain arithmetic on the
adapter's tensors is refused here, before a tensor is read. Standard library only.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.headers import parse_json
from fisherkit.checkpoint.lora.named_modules import NamedModules
from fisherkit.checkpoint.lora.patterns import ModulePattern
from fisherkit.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
_MOST = 1e6  # ranks and scales beyond this are damage

Patterns = tuple[tuple[ModulePattern, float], ...]
"""Values for the modules whose names a pattern matches; the first that does counts."""

# Fields that stand for something other than plain low-rank factors, unless they are empty.
_VARIANTS: Mapping[str, str] = {
    "layer_replication": "replicated layers",
    "lora_bias": "biases on LoRA's factors",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_UNMERGEABLE: Mapping[str, str] = {"alora_invocation_tokens": "activated LoRA", "use_qalora": "QA-LoRA"}

# Initialisations that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take a part out of them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Fields of `adapter_config.json` that change the merged weights.

    Attributes:
        path: the file.
        rank: inner size of factors where no pattern says otherwise; those of the tensors must be the same.
        rank_pattern: other sizes, by regular expression on the end of a module's name.
        alpha: numerator of the scale where no pattern says otherwise.
        alpha_pattern: other numerators, in the same way.
        rank_stabilised: the scale is alpha / sqrt(rank) instead of alpha / rank.
        dora: weights are split into magnitude and direction.
        fan_in_fan_out: the last module that was adapted stores its weight as [in, out].
        input_first: factors of fused experts make [in, out], as peft before 0.19 has it whatever the experts are.
        modules: those that have factors, by what is said of them.
        parameters: names, or ends of names, of parameters that were adapted directly.
        token_indices: rows of trainable tokens, by the name of their module; ``""`` is the input embedding.
        saved: ends of names of modules that were trained whole.
        base_model: what the adapter was trained on, as it was called then.
        revision: commit or branch of it.
    """

    path: Path
    rank: float
    rank_pattern: Patterns
    alpha: float
    alpha_pattern: Patterns
    rank_stabilised: bool
    dora: bool
    fan_in_fan_out: bool
    input_first: bool
    modules: NamedModules
    parameters: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]]
    saved: tuple[str, ...]
    base_model: str | None
    revision: str | None

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read and check the configuration in a folder.

        Raises:
            CheckpointError: it is missing or damaged, or this kind of adapter must be merged by peft.
        """
        path = folder / CONFIG_NAME
        try:
            raw = parse_json(path, path.read_bytes(), "adapter configuration")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        _refuse_variants(path, raw)
        return cls(
            path=path,
            rank=_rank(path, "r", raw.get("r", 8)),
            rank_pattern=_patterns(path, "rank_pattern", raw, _rank),
            alpha=_number(path, "lora_alpha", raw.get("lora_alpha", 8)),
            alpha_pattern=_patterns(path, "alpha_pattern", raw, _number),
            rank_stabilised=_flag(path, "use_rslora", raw),
            dora=_flag(path, "use_dora", raw),
            fan_in_fan_out=_flag(path, "fan_in_fan_out", raw),
            input_first=_version(raw.get("peft_version")) < (0, 19),
            modules=NamedModules.read(path, raw),
            parameters=_names(path, "target_parameters", raw),
            token_indices=_token_indices(path, raw.get("trainable_token_indices")),
            saved=_names(path, "modules_to_save", raw),
            base_model=_text(path, "base_model_name_or_path", raw),
            revision=_text(path, "revision", raw),
        )

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of the product of a module's factors.

        Args:
            module: its name in the model that was trained, or that of the parameter.
            rank: inner size of its factors.
        """
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def rank_of(self, module: str) -> float:
        """Return the inner size that a module's factors should have."""
        return _first_match(self.rank_pattern, module, self.rank)

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Names of the parameters of ``module`` that were adapted directly, such as ``gate_up_proj``; sorted."""
        leaves = {name.rpartition(".")[2] for name in self.parameters}
        return tuple(sorted(leaf for leaf in leaves if _ends_one_of(f"{module}.{leaf}", self.parameters)))

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """Rows of ``module`` that were trained; None if the configuration names none for it."""
        for name, rows in self.token_indices.items():
            if not name or _ends_one_of(module, (name,)):
                return rows
        return None

    def is_saved(self, name: str) -> bool:
        """Return whether tensor ``name`` belongs to a module that was trained whole."""
        return any(f".{module}." in f".{name}." for module in self.saved)


def merge_first(folder: Path) -> str:
    """Return the advice for an adapter that cannot be read here, as the end of a sentence."""
    return (
        f"merge it first: from peft import AutoPeftModelForCausalLM as Auto; "
        f"model = Auto.from_pretrained({str(folder)!r}).merge_and_unload(); model.save_pretrained('merged')"
    )


def _refuse_variants(path: Path, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    start = raw.get("init_lora_weights", True)
    reasons = [what for field, what in _VARIANTS.items() if raw.get(field)]
    if kind != "LORA":
        reasons = [f"peft_type {kind!r}"]
    elif raw.get("bias", "none") != "none":
        reasons.append("trained biases")
    elif (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
        reasons.append(f"init_lora_weights {start!r}, which changes the base weights,")
    if reasons:
        raise CheckpointError(f"{path}: an adapter with {reasons[0]} is not read here; {merge_first(path.parent)}")
    for field, what in _UNMERGEABLE.items():
        if raw.get(field):
            raise CheckpointError(
                f"{path}: {what} cannot be merged into weights, by peft neither; give another adapter"
            )


def _first_match(patterns: Patterns, module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.matches(module)), default)


def _number(path: Path, field: str, value: Any) -> float:
    # Compared before anything is converted: JSON has whole numbers beyond every float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST <= value <= _MOST:
        raise CheckpointError(f"{path}: {field} is {_short(value)}, not a number to scale by; fetch the adapter again")
    return float(value)


def _rank(path: Path, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= _MOST or value % 1:
        raise CheckpointError(f"{path}: {field} is {_short(value)}, not a rank of 1 or more; fetch the adapter again")
    return float(value)


def _flag(path: Path, field: str, raw: Mapping[str, Any]) -> bool:
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {field} is {_short(value)}, neither true nor false; fetch the adapter again")
    return bool(value)


def _text(path: Path, field: str, raw: Mapping[str, Any]) -> str | None:
    value = raw.get(field)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{path}: {field} is {_short(value)}, not a text; fetch the adapter again")
    return value or None


def _short(value: Any) -> str:
    """A value as a person may look at it."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a whole number of too many digits
        return "too large to show"
    return text if len(text) <= 40 else text[:40] + " ..."


def _names(path: Path, field: str, raw: Mapping[str, Any]) -> tuple[str, ...]:
    value = raw.get(field) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{path}: {field} is not a list of names; fetch the adapter again")
    return tuple(value)


def _patterns(path: Path, field: str, raw: Mapping[str, Any], number: Callable[[Path, str, Any], float]) -> Patterns:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {field} is not an object; fetch the adapter again")
    found = []
    for key, given in value.items():
        try:
            found.append((ModulePattern(key), number(path, f"{field}[{_short(key)}]", given)))
        except ValueError as error:
            raise CheckpointError(f"{path}: {field}: {_short(key)} {error}; {merge_first(path.parent)}") from None
    return tuple(found)


def _version(value: Any) -> tuple[int, ...]:
    """Major and minor; zeros where nothing is said, as before 0.18."""
    match = re.match(r"(\d+)\.(\d+)", str(value))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _token_indices(path: Path, value: Any) -> dict[str, tuple[int, ...]]:
    """One list is for the input embedding, whatever its name."""
    by_module = value if isinstance(value, dict) else {"": value} if value else {}
    for rows in by_module.values():
        if not isinstance(rows, list) or not all(type(row) is int for row in rows):
            raise CheckpointError(f"{path}: trainable_token_indices are not lists of numbers; fetch the adapter again")
    return {name: tuple(rows) for name, rows in by_module.items()}


def _ends_one_of(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
