"""Options of ``fapm`` and ``merge``."""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Literal

from fisherkit.errors import OptionError
from fisherkit.options.checks import (
    as_paths,
    as_typed,
    at_least,
    check_patterns,
    check_share,
    check_weights,
    exact_share,
    one_of,
)
from fisherkit.options.part import Part, check_part

Metric = Literal["fapm", "relative", "magnitude", "random", "wise-ft", "dare", "della"]
Scope = Literal["tensor", "layer", "global"]
OnNan = Literal["refuse", "keep-base"]
Rest = Literal["tuned", "base"]
Side = Literal["both", "left", "right"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Options of every command that makes a checkpoint from BASE and FT.

    Attributes:
        only: take part in it only tensors whose checkpoint name one of these regular expressions is found in;
            ``matrices`` stands for those of two or more axes inside the text model's blocks. None given: all.
        skip: leave out tensors whose name one of these is found in.
        rest: where floating tensors that are left out come from, ``tuned`` (as fine-tuned) or ``base``.
        nan: ``refuse`` tensors with NaN or infinities, or ``keep-base`` in their place.
        seed: of what is random.
        shard_bytes: largest shard; None for shards like BASE's.
        force: replace an existing output of fisherkit's.
        resume: go on with what a killed run left in ``<out>.partial/``.
        shard: write one of several shares of the output's files, (3, 16) being the third of sixteen; the last one puts
            the output together. None writes all of it.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    rest: Rest = "tuned"
    nan: OnNan = "refuse"
    seed: int = 0
    shard_bytes: int | None = None
    force: bool = False
    resume: bool = False
    shard: Part | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.shard is not None:
            object.__setattr__(self, "shard", check_part("shard", self.shard))
        check_patterns("only", self.only)
        check_patterns("skip", self.skip)
        one_of("rest", self.rest, Rest)
        one_of("nan", self.nan, OnNan)
        at_least("seed", self.seed, 0)
        at_least("max-shard-size", self.shard_bytes, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FapmOptions(PairOptions):
    """Options of ``fapm``, which prunes a delta; the fields of PairOptions come first.

    Attributes:
        sparsity: share of the entries that go back to the base; None for 0.9, or 0.1 where FT is an adapter.
        density: the same, as the share that is kept; not both.
        metric: by what entries are kept; ``wise-ft``, ``dare`` and ``della`` are no selections.
        scope: over what the quota runs: every tensor, every layer, or the whole model.
    """

    sparsity: float | None = None
    density: float | None = None
    metric: Metric = "fapm"
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("sparsity", self.sparsity)
        check_share("density", self.density)
        if self.sparsity is not None and self.density is not None:
            raise OptionError("--sparsity and --density say the same thing; give one of them")
        one_of("metric", self.metric, Metric)
        one_of("scope", self.scope, Scope)
        if not self.selects and self.scope != "tensor":
            raise OptionError(f"--scope {self.scope} is for metrics that select; {self.metric} has no quota")

    @property
    def selects(self) -> bool:
        """True where the metric keeps entries as they are; the others rescale or interpolate."""
        return self.metric in ("fapm", "relative", "magnitude", "random")

    def kept_share(self, default_sparsity: float) -> Fraction:
        """Return the share of entries that is kept, exactly."""
        if self.density is not None:
            return exact_share(self.density)
        return 1 - exact_share(default_sparsity if self.sparsity is None else self.sparsity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions(PairOptions):
    """Options of ``merge``, applied to a delta in this order; the fields of PairOptions come first.

    Attributes:
        mask: a mask file; entries that may not change stay the base's.
        subspace: a subspace file; what lies in its directions is removed from the delta.
        side: of which directions: of outputs (``left``), of inputs (``right``), or of either.
        layer_scale: a ``layer_importance.json``; the delta of a layer is scaled by ``(median(I) / I_layer)^power``,
            I being the mean Fisher of a layer's weights, clipped to ``[floor, 1]``.
        power: see above.
        floor: see above.
        alpha: all of the delta is scaled by it; alone it is Wise-FT's interpolation.
        regmean: instead of the above (but ``alpha``), solve with covariances of inputs: files of OLD abilities (None
            for the fine-tunes alone) and of the NEW task.
        fisher: the same with diagonal Fishers.
        old_weight: what OLD counts beside NEW.
        also: further fine-tunes of BASE, each with its own NEW.
        weights: what FT and each of ``also`` count beside each other, one number each; None for 1 each.
        damping: what is added to NEW in every direction, as a share of its mean, and decides where NEW says nothing;
            None for 0.001 of covariances and 0.000001 of Fishers.
        lora_rank: of ``regmean``: besides, make an adapter of this rank of the solved deltas, in ``OUT/lora``.
        force_model: take files that were measured on another model.
    """

    mask: Path | None = None
    subspace: Path | None = None
    side: Side = "both"
    layer_scale: Path | None = None
    power: float = 0.5
    floor: float = 0.1
    alpha: float = 1.0
    regmean: tuple[Path | None, Path] | None = None
    fisher: tuple[Path | None, Path] | None = None
    old_weight: float = 1.0
    also: tuple[tuple[str, Path], ...] = ()
    weights: tuple[float, ...] | None = None
    damping: float | None = None
    lora_rank: int | None = None
    force_model: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        as_paths(self, "mask", "subspace", "layer_scale")
        self._check_solve()
        one_of("side", self.side, Side)
        check_share("floor", self.floor)
        for option, value in (("power", self.power), ("alpha", self.alpha)):
            if not (isinstance(value, int | float) and -1e6 < value < 1e6):
                raise OptionError(f"--{option} must be a finite number, not {as_typed(value)}")
        if self.power < 0:
            raise OptionError(
                f"--power must not be negative, not {as_typed(self.power)}: important layers would change most"
            )
        self._refuse_idle()

    @property
    def solves(self) -> bool:
        """True where deltas are solved for."""
        return self.regmean is not None or self.fisher is not None

    @property
    def tune_weights(self) -> tuple[float, ...]:
        """What FT and each of ``also`` count."""
        return self.weights if self.weights is not None else (1.0,) * (1 + len(self.also))

    def _refuse_idle(self) -> None:
        """Refuse what would change nothing: whoever gave it forgot what it belongs to."""
        idle = {
            "old-weight": self.old_weight != 1.0 and not self.solves,
            "damping": self.damping is not None and not self.solves,
            "power": self.power != 0.5 and self.layer_scale is None,
            "floor": self.floor != 0.1 and self.layer_scale is None,
            "side": self.side != "both" and self.subspace is None,
        }
        owners = {"power": "--layer-scale", "floor": "--layer-scale", "side": "--subspace"}
        for option, is_idle in idle.items():
            if is_idle:
                raise OptionError(f"--{option} is for {owners.get(option, '--regmean and --fisher')}; add it")

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        if not self.also or len(self.weights) != 1 + len(self.also):
            raise OptionError(
                f"--weights has {len(self.weights)} numbers for FT and {len(self.also)} of --also; give one for each"
            )
        check_weights(self.weights)

    def _check_solve(self) -> None:
        for option in ("regmean", "fisher"):
            given = getattr(self, option)
            if given is not None:
                old, new = given
                object.__setattr__(self, option, (None if old is None else Path(old), Path(new)))
                if old is None and not self.also:
                    raise OptionError(f"--{option} none NEW merges several fine-tunes; add them with --also FT2 NEW2")
        object.__setattr__(self, "also", tuple((str(tune), Path(new)) for tune, new in self.also))
        for name, value, least in (("old-weight", self.old_weight, 0.0), ("damping", self.damping, 1e-12)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and least <= value <= 1e12):
                raise OptionError(f"--{name} must lie between {least:g} and 1e12, not {as_typed(value)}")
        ways = {"regmean": self.regmean, "fisher": self.fisher, "mask": self.mask, "subspace": self.subspace}
        given = [way for way, value in (ways | {"layer-scale": self.layer_scale}).items() if value is not None]
        if self.solves and len(given) > 1:
            raise OptionError(f"--{given[0]} and --{given[1]} are two ways to merge; give one of them")
        at_least("lora-rank", self.lora_rank, 1)
        if self.lora_rank is not None and self.regmean is None:
            raise OptionError("--lora-rank is for --regmean, whose deltas it makes an adapter of")
        if self.also and not self.solves:
            raise OptionError("--also is for --regmean and --fisher")
        self._check_weights()
