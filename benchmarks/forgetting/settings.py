"""A setting of a method, ``STRENGTH@RATExLENGTH``, and the grid that every method that learns gets alike."""

from collections.abc import Mapping
from dataclasses import dataclass

RATES = ("0.4", "1", "2.5")
"""Shares of the learning rate of plain fine-tuning, for every method that has a strength of its own."""
PLAIN_RATES = ("0.1", "0.2", "0.4", "0.7", "1", "2.5")
"""Plain fine-tuning has nothing else to turn: as many settings as the others."""
NO_STRENGTH = "-"

STRENGTHS: Mapping[str, tuple[str, str]] = {
    "random-rows": ("0.1", "0.3"),
    "migu": ("0.7", "0.9"),
    "fggm": ("0.1", "0.3"),
    "fggm-output": ("0.1", "0.3"),
    "protect": ("0.5", "0.8"),
    "layer-scale": ("0.5", "1"),
    "fisher-subspace": ("0.25", "0.5"),
    "weight-subspace": ("0.25", "0.5"),
    "activation": ("0.9", "0.98"),
    "kron": ("0.9", "0.98"),
    "ewc": ("1", "10"),
    "ewc-data": ("1", "10"),
    "l2-sp": ("1", "10"),
    "recadam": ("0.3", "1"),
    "pull": ("5", "15"),
    "pull-fisher": ("5", "15"),
    "distil": ("5", "20"),
    "replay": ("0.25", "0.5"),
    "lora": ("4", "16"),
    "lora+shield": ("5", "15"),
    "lora+layer-scale": ("0.5", "1"),
    "regmean-onward": ("0.3", "3"),
    "shield": ("5", "15"),
    "shield-text": ("5", "15"),
    "shield-onward": ("5", "15"),
}
"""A method's own knob, at two places: what each means is said where the method is. Published values where there are
any. Those of shield, pull, ewc, distil and l2-sp were picked by eye on a draw that is in no result (seed 100): the
shield's from three values on three tasks, at two rates and on two bases; the others' from two or three on one task at
one rate. The rest was not tried beforehand."""

PARTS: Mapping[str, tuple[str, str]] = {
    "fapm": ("0.5", "0.9"),
    "magnitude": ("0.5", "0.9"),
    "random": ("0.5", "0.9"),
    "relative": ("0.5", "0.9"),
    "dare": ("0.5", "0.9"),
    "wise-ft": ("0.3", "0.6"),
    "regmean": ("0.3", "3"),
    "fisher-merge": ("0.3", "3"),
    "layer-scale-merge": ("0.5", "1"),
    "shield-merge": ("5", "15"),
    "long+fapm": ("0.5", "0.9"),
    "lora+fapm": ("0.1", "0.5"),
    "lora+layer-scale-merge": ("0.5", "1"),
    "fggm+fapm": ("0.5", "0.9"),
}
"""Two settings of every method that keeps a part of a finished fine-tune."""

MORE: Mapping[str, tuple[str, ...]] = {
    "shield": ("1.5@1", "1.5@2.5"),
    "fisher-subspace": ("0.1@1", "0.75@1"),
    "fapm": ("0.3", "0.7", "0.95"),
    "wise-ft": ("0.1", "0.8"),
    "regmean": ("0.1", "1", "10"),
    "fisher-merge": ("1",),
}
"""Settings beside the grid, which a large size runs too."""


@dataclass(frozen=True)
class Setting:
    """Strength, share of the learning rate, and how many times as many steps."""

    strength: str = NO_STRENGTH
    rate: float = 1.0
    length: int = 1

    @classmethod
    def of(cls, text: str) -> "Setting":
        """Read ``0.3@2.5x4``; rate and length are 1 where they are not said."""
        strength, _, rest = text.partition("@")
        rate, _, length = rest.partition("x")
        return cls(strength, float(rate or 1), int(length or 1))

    def __str__(self) -> str:
        return f"{self.strength}@{self.rate:g}" + (f"x{self.length}" if self.length > 1 else "")


def grid(method: str) -> tuple[str, ...]:
    """Return the settings that a method is compared by: three rates by two strengths, six rates of plain fine-tuning.

    A method that acts on a finished fine-tune has two.
    """
    if method == "plain":
        return tuple(f"{NO_STRENGTH}@{rate}" for rate in PLAIN_RATES)
    if method in PARTS:
        return PARTS[method]
    return tuple(f"{strength}@{rate}" for strength in STRENGTHS[method] for rate in RATES)


def whole_grid(method: str) -> tuple[str, ...]:
    """Return the settings that a method is compared by, and those beside them."""
    return (*grid(method), *MORE.get(method, ()))
