"""Modules that an adapter's settings name: ``target_modules`` and ``layers_to_transform``, as peft reads them.

peft puts factors on the modules that these name and on no others: what else an adapter file holds it leaves out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.lora.patterns import ModulePattern
from fisherkit.errors import CheckpointError

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class NamedModules:
    """What the settings name; everything where they say nothing that can be read here.

    Attributes:
        ends: names, or ends of names, of modules; None for any.
        pattern: for whole names; None for any. ``all-linear`` is any.
        layers: numbers of blocks; None for all.
        lists: names of the module lists that the numbers count in; empty for whichever a name has last.
    """

    ends: tuple[str, ...] | None = None
    pattern: ModulePattern | None = None
    layers: frozenset[int] | None = None
    lists: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, raw: Mapping[str, Any]) -> "NamedModules":
        """Read the fields.

        Args:
            path: the file, for messages.
            raw: its JSON.

        Raises:
            CheckpointError: a field of another type.
        """
        wanted = raw.get("target_modules")
        if wanted is not None and not isinstance(wanted, str) and not _are(str, wanted):
            raise _wrong(path, "target_modules", "neither names nor a pattern")
        layers = raw.get("layers_to_transform")
        layers = [layers] if type(layers) is int else layers
        if layers is not None and not _are(int, layers):
            raise _wrong(path, "layers_to_transform", "not numbers of layers")
        lists = raw.get("layers_pattern") or []
        lists = [lists] if isinstance(lists, str) else lists
        if not _are(str, lists):
            raise _wrong(path, "layers_pattern", "not names")
        return cls(
            ends=tuple(wanted) if isinstance(wanted, list) else None,
            pattern=_pattern(wanted) if isinstance(wanted, str) else None,
            layers=frozenset(layers) if layers else None,
            lists=tuple(lists),
        )

    def includes(self, module: str) -> bool:
        """Return whether the settings name a module.

        Args:
            module: its name in the model that was trained.
        """
        if self.ends is not None and not any(f".{module}".endswith(f".{end}") for end in self.ends):
            return False
        if self.pattern is not None and not self.pattern.matches(module):
            return False
        return self.layers is None or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        """Return the number of the block that a module lies in; None outside of the blocks."""
        start = max((module.rfind(f"{name}.") for name in self.lists), default=0)
        numbers = _NUMBER.findall(module, max(start, 0))
        return (int(numbers[0]) if self.lists else int(numbers[-1])) if numbers else None


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _pattern(text: str) -> ModulePattern | None:
    if text == "all-linear":
        return None
    try:
        return ModulePattern(text)
    except ValueError:  # look-around and the like: nothing depends on it but a note
        return None


def _wrong(path: Path, field: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {field} are {what}; fetch the adapter again")
