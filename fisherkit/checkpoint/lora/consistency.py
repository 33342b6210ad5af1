"""Settings of an adapter held against its tensors: what the settings name and the file lacks is refused, or noted."""

from collections.abc import Iterable, Sequence

from fisherkit.checkpoint.lora.base_weights import BaseWeights
from fisherkit.checkpoint.lora.config import AdapterConfig
from fisherkit.checkpoint.lora.keys import Key
from fisherkit.errors import CheckpointError, some_names


def refuse_missing_tokens(keys: Sequence[Key], config: AdapterConfig, base: BaseWeights) -> None:
    """Refuse an adapter that names trainable tokens of a module and holds none of them.

    Args:
        keys: of the adapter file.
        config: its settings.
        base: where embedding and head are one weight, the rows of either serve both.

    Raises:
        CheckpointError: see above.
    """
    trained = [key.module for key in keys if key.role == "tokens"]
    for name, rows in config.token_indices.items():
        held = any(not name or f".{module}".endswith(f".{name}") for module in trained)
        if rows and not held and not (base.tied and trained):
            of = f" of {name!r}" if name else ""
            raise CheckpointError(
                f"{config.path}: names {len(rows)} trainable tokens{of}, and the file beside it holds none; fetch the "
                "adapter again"
            )


def unused_settings(keys: Sequence[Key], adapted: Iterable[str], config: AdapterConfig, base: BaseWeights) -> list[str]:
    """Return a note for each kind of setting that nothing in the file corresponds to.

    Args:
        keys: of the adapter file.
        adapted: names of the modules and parameters that have factors.
        config: its settings.
        base: gives the names of a tied embedding and head, of which one is enough.
    """
    notes, names = _other_modules(list(adapted), config, base), list(adapted)
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        unused = [repr(one.text) for one, _ in patterns if not any(one.matches(name) for name in names)]
        if unused:
            notes.append(f"the adapter's {field} is for modules that it has no factors of: {some_names(unused)}")
    held = [f".{key.module}." for key in keys if key.role in ("whole", "copy")]
    tied = [f".{name}." for name in base.tied]
    absent = [repr(name) for name in config.saved if not any(f".{name}." in one for one in (*held, *tied))]
    if absent:
        notes.append(f"the adapter's modules_to_save names what its file does not hold: {some_names(absent)}")
    return notes


def _other_modules(adapted: Sequence[str], config: AdapterConfig, base: BaseWeights) -> list[str]:
    """Return notes on modules that have factors and are not named, and on those that are named and have none."""
    notes = []
    modules = [name for name in adapted if not _is_parameter(name, config)]
    others = [repr(name) for name in modules if not config.modules.includes(name)]
    if others:
        notes.append(
            f"the adapter's settings (target_modules, layers_to_transform) leave out what its file has factors of, and "
            f"peft would not apply; here they are applied: {some_names(others)}"
        )
    absent = [repr(end) for end in config.modules.ends or () if _is_absent(end, adapted, base)]
    if absent:
        notes.append(f"the adapter's target_modules names what its file has no factors of: {some_names(absent)}")
    return notes


def _is_parameter(name: str, config: AdapterConfig) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf in config.parameters_of(module)


def _is_absent(end: str, adapted: Sequence[str], base: BaseWeights) -> bool:
    """Whether the base has modules of a name, and the adapter none; models lack some of the names that people list."""
    if any(f".{name}".endswith(f".{end}") for name in adapted):
        return False
    return any(f".{name}".endswith(f".{end}.weight") for name in base.index.tensors)
