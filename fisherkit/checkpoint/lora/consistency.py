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
    notes, names = [], list(adapted)
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
