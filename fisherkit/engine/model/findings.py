"""Findings about a model that change how it is run. They are no errors: ``extract`` catches them and acts on them."""

from collections.abc import Sequence
from typing import Any


class Unreplayable(Exception):  # noqa: N818 - a finding
    """Blocks of this model cannot be run one by one: another engine is chosen. The message completes a sentence."""


class NeedsBatchSizeOne(Exception):  # noqa: N818 - a finding
    """A target cannot be squared per sample inside a batch; ``general`` names parameters to leave to autograd."""

    def __init__(self, general: frozenset[str]) -> None:
        super().__init__()
        self.general = general


class AttendsAhead(Exception):  # noqa: N818 - a finding
    """Tokens see the ones after them, so that labels leak into what predicts them."""


class FoundInModel(Exception):  # noqa: N818 - a finding
    """One of the findings above, about one of several models that are run together.

    Attributes:
        number: of the model.
        finding: what was found.
    """

    def __init__(self, number: int, finding: Unreplayable | NeedsBatchSizeOne | AttendsAhead) -> None:
        super().__init__()
        self.number, self.finding = number, finding


FINDINGS = (AttendsAhead, Unreplayable, NeedsBatchSizeOne)
"""All of them, the one that decides most first."""


def encode_finding(finding: Exception) -> tuple[str, list[str]]:
    """Return a finding as plain data, for another process."""
    general = sorted(finding.general) if isinstance(finding, NeedsBatchSizeOne) else [str(finding)]
    return type(finding).__name__, general


def decode_findings(found: Sequence[tuple[str, list[str]]]) -> Exception | None:
    """Return the one finding that several processes act on, from those of each; None where there is none."""
    by_name: dict[str, list[list[str]]] = {}
    for name, details in found:
        by_name.setdefault(name, []).append(details)
    kind: Any = next((kind for kind in FINDINGS if kind.__name__ in by_name), None)
    if kind is None:
        return None
    every = by_name[kind.__name__]
    if kind is NeedsBatchSizeOne:
        return NeedsBatchSizeOne(frozenset(name for names in every for name in names))
    finding: Exception = kind(every[0][0])
    return finding
