"""Choice of the tensors that take part in a command, and of what becomes of the others: one rule for fapm and merge.

- Floating tensors that both checkpoints have take part, if ``--only`` and ``--skip`` let them.
- Those left out are FT's as they are, or BASE's (``--rest``).
- Integer and boolean tensors, and those that only BASE has, are BASE's. What only FT has is dropped, and named.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fisherkit.checkpoint.names.location import Location, block_prefix, locate
from fisherkit.errors import OptionError
from fisherkit.options import PairOptions
from fisherkit.pairs.reader import Tensors, is_floating


@dataclass(frozen=True)
class Chosen:
    """Tensors of BASE, by what happens to them.

    Attributes:
        names: take part.
        rest: floating, in both checkpoints, left out by --only and --skip.
        integers: of other types; BASE's.
        base_only: FT has none of them; BASE's.
        dropped: names in FT that BASE has no place for.
        places: where each of BASE's tensors sits in the model.
    """

    names: tuple[str, ...]
    rest: tuple[str, ...]
    integers: tuple[str, ...]
    base_only: tuple[str, ...]
    dropped: tuple[str, ...]
    places: Mapping[str, Location]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _rest(self) -> frozenset[str]:
        return frozenset(self.rest)

    def takes_part(self, name: str) -> bool:
        """Return whether a tensor of BASE takes part."""
        return name in self._names

    def is_left_out(self, name: str) -> bool:
        """Return whether a tensor of BASE is left out by --only and --skip."""
        return name in self._rest

    def facts(self, rest: str) -> dict[str, object]:
        """Return what was not worked on and where it comes from, for the report; ``rest`` is the option."""
        return {
            "left_out": {"tensors": list(self.rest), "from": rest},
            "not_floating": {"tensors": list(self.integers), "from": "base"},
            "not_in_tuned": {"tensors": list(self.base_only), "from": "base"},
            "not_in_base": {"tensors": list(self.dropped), "from": "dropped"},
        }


def choose(tensors: Tensors, options: PairOptions) -> Chosen:
    """Sort the tensors of BASE by what happens to them.

    Args:
        tensors: the pair.
        options: hold --only and --skip.

    Raises:
        OptionError: --only and --skip leave nothing, or a pattern of --only is found in no name.
    """
    index = tensors.checkpoints.base.index
    blocks = block_prefix(index.tensors)
    places = {name: locate(name, blocks) for name in index.tensors}
    both = [name for name in index.tensors if tensors.has_tuned(name)]
    floating = [name for name in both if is_floating(tensors.info(name))]
    matrices = {name for name in floating if len(tensors.info(name).shape) > 1 and places[name].layer is not None}
    for pattern in options.only:
        if not any(_found(pattern, name, matrices) for name in floating):
            raise OptionError(f"--only {pattern!r}: no tensor of both sides has such a name, as {floating[0]!r} has")
    names = [
        name
        for name in floating
        if (not options.only or any(_found(pattern, name, matrices) for pattern in options.only))
        and not any(_found(pattern, name, matrices) for pattern in options.skip)
    ]
    if not names:
        raise OptionError("--only and --skip leave no tensor to work on")
    taken = frozenset(names)
    return Chosen(
        names=tuple(names),
        rest=tuple(name for name in floating if name not in taken),
        integers=tuple(name for name in both if not is_floating(tensors.info(name))),
        base_only=tuple(name for name in index.tensors if not tensors.has_tuned(name)),
        dropped=tensors.checkpoints.tuned.dropped,
        places=places,
    )


def _found(pattern: str, name: str, matrices: set[str]) -> bool:
    return name in matrices if pattern == "matrices" else re.search(pattern, name) is not None
