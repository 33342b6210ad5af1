"""Options of ``mask`` and ``export``."""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Literal

from fisherkit.errors import OptionError
from fisherkit.options.checks import as_paths, as_typed, at_least, check_device, check_pull, exact_share, one_of
from fisherkit.options.merge import Scope, Side

Top = Literal["top"]
Direction = Literal["train", "protect"]
Aggregate = Literal["input", "output", "none"]
Combine = Literal["sum", "mean", "max"]
Preset = Literal["fggm", "fish", "ssu", "shield"]
MaskScore = Literal["fisher", "magnitude", "fisher-weight", "random", "gallop"]
Contrast = Literal["ratio", "difference", "relu-difference"]
Basis = Literal["fisher", "sqrt-fisher", "weight", "fisher-weight", "delta", "activation", "kron"]
ExportTarget = Literal["peft-shira", "axolotl", "llamafactory", "mergekit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Selection of a binary mask, with presets and defaults filled in.

    Attributes:
        direction: whether the top may change (``train``) or is what may not (``protect``).
        keep: share of the units that are the top, exactly.
        aggregate: over which dimension of a weight scores are combined: its ``input`` (a unit is an output row), its
            ``output`` (a unit is an input column), or ``none`` (a unit is an entry).
        combine: how: ``sum``, ``mean`` or ``max``.
        scope: where the top is taken: of every ``tensor``, every ``layer``, or ``global``.
    """

    direction: Direction
    keep: Fraction
    aggregate: Aggregate
    combine: Combine
    scope: Scope


PRESETS: dict[str, tuple[Direction, float, Aggregate, Scope]] = {
    "fggm": ("train", 0.3, "input", "tensor"),
    "fish": ("train", 0.005, "none", "global"),
    "ssu": ("protect", 0.5, "output", "tensor"),
}
"""Direction, keep, aggregate and scope of what was published; see methods.mask.build."""
SHIELD: tuple[Basis, float, float] = ("activation", 0.99, 5.0)
"""Basis, energy and pull of the preset ``shield``; see methods.mask.build."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Options of ``mask``, which makes a binary mask, or with ``svd_rank`` or ``svd_energy`` a subspace.

    Attributes:
        train: ``top``: what scores highest may change, all else is frozen (a Fisher of the *new* task).
        protect: ``top``: what scores highest is frozen, all else may change (a Fisher of *old* abilities).
        preset: ``fggm``, ``fish``, ``ssu`` or ``shield``; what is given besides wins over it.
        keep: share of the units that are the top, above 0 and below 1; None for the preset's, or 0.3.
        aggregate: see Selection; None for the preset's, or ``input``.
        combine: see Selection; None for ``sum``.
        scope: see Selection; None for the preset's, or ``tensor``.
        score: what is ranked; see methods.mask.build.
        weights: the model's checkpoint, for scores and bases that look at the weights.
        against: a second Fisher; units are ranked by how far the first exceeds it.
        contrast: how the two are compared; None for ``ratio``.
        svd_rank: singular modes per matrix.
        svd_energy: as many modes as hold this share of a matrix's sum of squares, above 0 and at most 1.
        pull: how hard a whole course of training draws updates back out of the directions of the basis
            ``activation``, above 0; see kernels.pull. None for a hard subspace, of which an update stays out.
        basis: the matrix whose modes are taken; None for ``fisher``.
        delta: a fine-tune of ``weights``, for the basis ``delta``.
        activations: what ``extract --statistics activations`` wrote, for the bases ``activation`` and ``kron``; None
            for what lies beside the Fisher.
        side: which modes are stored: of outputs (``left``), of inputs (``right``), or both; None for both, and for the
            inputs that the basis ``activation`` knows alone.
        device: where modes are computed: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        seed: of random scores.
        force: replace an existing output.
    """

    train: Top | None = None
    protect: Top | None = None
    preset: Preset | None = None
    keep: float | None = None
    aggregate: Aggregate | None = None
    combine: Combine | None = None
    scope: Scope | None = None
    score: MaskScore = "fisher"
    weights: str | Path | None = None
    against: Path | None = None
    contrast: Contrast | None = None
    svd_rank: int | None = None
    svd_energy: float | None = None
    pull: float | None = None
    basis: Basis | None = None
    delta: str | Path | None = None
    activations: Path | None = None
    side: Side | None = None
    device: str = "auto"
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        as_paths(self, "against", "activations")
        for name in ("weights", "delta"):  # may be org/name, so a text it is
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else str(value))
        for option, value, kind in (
            ("train", self.train, Top),
            ("protect", self.protect, Top),
            ("preset", self.preset, Preset),
            ("aggregate", self.aggregate, Aggregate),
            ("combine", self.combine, Combine),
            ("scope", self.scope, Scope),
            ("score", self.score, MaskScore),
            ("contrast", self.contrast, Contrast),
            ("basis", self.basis, Basis),
            ("side", self.side, Side),
        ):
            if value is not None:
                one_of(option, value, kind)
        at_least("seed", self.seed, 0)
        check_device(self.device)
        if self.preset == "shield":
            self._fill_shield()
        if self.is_subspace:
            self._check_subspace()
        else:
            self._check_mask()

    @property
    def is_subspace(self) -> bool:
        """True where directions are protected, not entries."""
        return self.svd_rank is not None or self.svd_energy is not None

    @property
    def reads_activations(self) -> bool:
        """True where the basis is one of activations."""
        return self.basis in ("activation", "kron")

    @property
    def stored_side(self) -> Side:
        """Return which modes are stored."""
        return self.side or ("right" if self.basis == "activation" else "both")

    @property
    def selection(self) -> Selection:
        """Return how a binary mask selects."""
        direction, keep, aggregate, scope = PRESETS.get(self.preset or "", ("train", 0.3, "input", "tensor"))
        if self.train or self.protect:
            direction = "train" if self.train else "protect"
        return Selection(
            direction=direction,
            keep=exact_share(keep if self.keep is None else self.keep),
            aggregate=self.aggregate or aggregate,
            combine=self.combine or "sum",
            scope=self.scope or scope,
        )

    def _fill_shield(self) -> None:
        basis, energy, pull = SHIELD
        filled = {"basis": self.basis or basis, "pull": pull if self.pull is None else self.pull}
        if not self.is_subspace:
            filled["svd_energy"] = energy
        for name, value in filled.items():
            object.__setattr__(self, name, value)

    def _check_mask(self) -> None:
        if self.train and self.protect:
            raise OptionError("--train top and --protect top are opposites; give one of them")
        if not (self.train or self.protect or self.preset):
            raise OptionError(
                "name the direction: --train top (what ranks highest may change: a Fisher of the new task) or "
                "--protect top (what ranks highest is frozen: a Fisher of old abilities)"
            )
        if self.keep is not None and not 0 < self.keep < 1:
            wrong = {0.0: "0 selects nothing", 1.0: "1 selects everything"}.get(self.keep, f"{self.keep} is no share")
            raise OptionError(f"--keep must lie above 0 and below 1: {wrong}")
        if self.combine is not None and self.selection.aggregate == "none":
            raise OptionError(f"--combine {self.combine} is for aggregated scores, not for --aggregate none")
        needs_weights = self.score in ("magnitude", "fisher-weight", "gallop")
        self._check_weights(f"--score {self.score}", needed=needs_weights)
        if self.against is not None and self.score != "fisher":
            raise OptionError(f"--against compares two Fishers; --score {self.score} does not")
        if self.contrast is not None and self.against is None:
            raise OptionError(f"--contrast {self.contrast} compares with a second Fisher; give it with --against")
        self._refuse("is for subspaces (--svd-rank or --svd-energy)", basis=self.basis, delta=self.delta)
        self._refuse("is for subspaces (--svd-rank or --svd-energy)", side=self.side, activations=self.activations)
        self._refuse("is for subspaces (--svd-rank or --svd-energy)", pull=self.pull)

    def _check_subspace(self) -> None:
        if self.svd_rank is not None and self.svd_energy is not None:
            raise OptionError("--svd-rank and --svd-energy both say how many modes; give one of them")
        at_least("svd-rank", self.svd_rank, 1)
        if self.svd_energy is not None and not 0 < self.svd_energy <= 1:
            raise OptionError(f"--svd-energy must lie above 0 and not above 1, not {as_typed(self.svd_energy)}")
        if self.train:
            raise OptionError("--train top does not go with a subspace: its directions are protected, never trained")
        given = {name: getattr(self, name) for name in ("keep", "aggregate", "combine", "scope", "against")}
        given["preset"] = self.preset if self.preset != "shield" else None
        score = self.score if self.score != "fisher" else None
        self._refuse("is for binary masks, not for subspaces", **given, contrast=self.contrast, score=score)
        basis = self.basis or "fisher"
        self._check_weights(f"--basis {basis}", needed=basis in ("weight", "fisher-weight", "delta"))
        if (basis == "delta") != (self.delta is not None):
            raise OptionError("--basis delta and --delta FT belong together: the modes of FT - WEIGHTS")
        if self.activations is not None and not self.reads_activations:
            raise OptionError(f"--activations is given, but --basis {basis} does not look at them")
        if basis == "activation" and self.stored_side != "right":
            raise OptionError(f"--side {self.side}: --basis activation knows inputs (right); --basis kron has both")
        if self.pull is not None:
            check_pull(self.pull)
            if basis != "activation":
                asked = "--preset shield" if self.preset == "shield" else f"--pull {self.pull}"
                raise OptionError(f"{asked} is for --basis activation, not for --basis {basis}")

    def _check_weights(self, reader: str, *, needed: bool) -> None:
        if needed and self.weights is None:
            raise OptionError(f"{reader} looks at the weights; give the model's checkpoint with --weights")
        if self.weights is not None and not needed:
            raise OptionError(f"--weights is given, but {reader} does not look at the weights")

    def _refuse(self, reason: str, **given: object) -> None:
        for name, value in given.items():
            if value is not None:
                raise OptionError(f"--{name.replace('_', '-')} {value} {reason}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of ``export``, which writes for other tools.

    Attributes:
        to: the tool.
        learning_rate: of the layer that changes most; the others' are scaled down from it (``axolotl``).
        base: the model's name in what is written; None for the one that the mask was measured on.
        tuned: the fine-tune's name in what is written (``mergekit``).
        force: replace an existing file.
    """

    to: ExportTarget
    learning_rate: float = 1e-5
    base: str | None = None
    tuned: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        one_of("to", self.to, ExportTarget)
        if not 0 < self.learning_rate < 1:
            raise OptionError(f"--learning-rate must lie between 0 and 1, not {as_typed(self.learning_rate)}")
