"""What a caller may choose, as frozen dataclasses that check themselves.

Standard library only: building options must not import torch.
"""

import dataclasses
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from fisherkit.errors import OptionError

Metric = Literal["fapm", "relative", "magnitude", "random", "wise-ft", "dare", "della"]
Scope = Literal["tensor", "layer", "global"]
OnNan = Literal["refuse", "keep-base"]
Rest = Literal["tuned", "base"]
Side = Literal["both", "left", "right"]
Top = Literal["top"]
Direction = Literal["train", "protect"]
Aggregate = Literal["input", "output", "none"]
Combine = Literal["sum", "mean", "max"]
Preset = Literal["fggm", "fish", "ssu", "shield"]
MaskScore = Literal["fisher", "magnitude", "fisher-weight", "random", "gallop"]
Contrast = Literal["ratio", "difference", "relu-difference"]
Basis = Literal["fisher", "sqrt-fisher", "weight", "fisher-weight", "delta", "activation", "kron"]
ExportTarget = Literal["peft-shira", "axolotl", "llamafactory", "mergekit"]
Loss = Literal["auto", "all", "completion", "assistant"]
Labels = Literal["data", "sampled"]
Reduction = Literal["mean", "sum"]
Engine = Literal["auto", "stream", "resident"]
Store = Literal["bf16", "fp32"]
Statistics = Literal["fisher", "activations"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
ChatTemplate = Literal["auto", "on", "off"]


def _one_of(option: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise OptionError(f"--{option} must be one of {', '.join(get_args(kind))}, not {value!r}")


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise OptionError(f"--{option} must be at least {least}, not {value}")


def _paths(options: object, *names: str) -> None:
    """Take strings for paths, as everything else in the library does."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, str):
            object.__setattr__(options, name, Path(value))


def _share(option: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise OptionError(f"--{option} must lie between 0 and 1, not {value}")


def check_pull(pull: float) -> None:
    """Raise OptionError unless a pull is a number above 0 and below a million."""
    if not (isinstance(pull, int | float) and 0 < pull < 1e6):
        raise OptionError(f"--pull must lie above 0 and below 1000000, not {pull}")


def _device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?", device):
        raise OptionError(f"--device takes auto, cpu, cuda or cuda:N, not {device!r}")


def _patterns(option: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"--{option} {pattern!r} is not a regular expression: {error}") from None


def exact_share(value: float) -> Fraction:
    """What a person means by a decimal: 0.9 is nine tenths, not the nearest binary number."""
    return Fraction(repr(value))


def parse_shares(option: str, text: str) -> tuple[float, ...]:
    """``"0.5,0.9"`` -> ``(0.5, 0.9)``; raises OptionError for anything outside of 0 to 1."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--{option} takes numbers such as 0.5,0.9,0.95, not {text!r}") from None
    for value in values:
        _share(option, value)
    return values


def parse_layers(text: str) -> tuple[int, ...]:
    """``"0-7,12"`` -> ``(0, 1, ..., 7, 12)``; raises OptionError for anything else."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise OptionError(f"--layers takes numbers and ranges such as 0-7,12; {part.strip()!r} is neither")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))


def parse_bytes(option: str, text: str) -> int:
    """``"5GB"`` -> 5,000,000,000; ``"5GiB"`` -> 5 * 2**30; a plain number is bytes. Raises OptionError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise OptionError(f"--{option} takes bytes such as 5GB or 500MiB, not {text!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def parse_json(option: str, text: str) -> dict[str, Any]:
    """A JSON object given as an option. Raises OptionError for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise OptionError(f"--{option} takes a JSON object such as '{{\"key\": false}}', not {text!r}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How a prompt set becomes token ids with marks on the tokens that count in the loss.

    Attributes:
        field: the column to read, or None to detect it from the first row.
        limit: use the first so many rows; None for all.
        max_length: truncate samples on the right to so many tokens.
        chat_template: ``auto`` uses the tokenizer's template when it has one.
        chat_template_kwargs: extra variables for the template, e.g. ``{"enable_thinking": False}``.
        loss: which tokens count; ``auto`` is ``completion`` where the set has answers, else ``all``.
    """

    field: str | None = None
    limit: int | None = 200
    max_length: int = 256
    chat_template: ChatTemplate = "auto"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)  # not `field`: hidden above
    loss: Loss = "auto"

    def __post_init__(self) -> None:
        _at_least("limit", self.limit, 1)
        _at_least("max-length", self.max_length, 2)
        _one_of("chat-template", self.chat_template, ChatTemplate)
        _one_of("loss", self.loss, Loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractOptions(PromptOptions):
    """What ``extract`` measures and how; the fields of PromptOptions come first.

    Attributes:
        group_size: decoder blocks whose weights and accumulators are resident at a time; lowered when they do not fit.
        batch_tokens: padded tokens per batch (samples of similar length share one); never changes the result.
        dtype: what the model computes in; ``auto`` is the checkpoint's own. Accumulators are always float32.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        labels: ``data`` (empirical Fisher) or ``sampled`` from the model's own distribution (true Fisher, one draw).
        reduction: the loss of a sample is the ``mean`` or the ``sum`` over its loss tokens.
        targets: ``matrices``, ``all``, or a regular expression searched in checkpoint tensor names.
        layers: block numbers to measure, or None for all.
        engine: ``stream`` (block by block), ``resident`` (whole model), or ``auto``.
        resume: continue what a killed run left in ``<out>.partial/``.
        store: dtype of the file, ``bf16`` or ``fp32``.
        statistics: ``fisher``, or ``activations``: beside it the second moments of what goes into every matrix and of
            the gradients at what comes out.
        seed: seed of sampled labels.
        force: replace an existing output.
        trust_remote_code: run Python code that ships with the checkpoint.
        shard_bytes: largest shard when the output is a folder.
    """

    group_size: int = 8
    batch_tokens: int = 1024
    dtype: DType = "auto"
    device: str = "auto"
    labels: Labels = "data"
    reduction: Reduction = "mean"
    targets: str = "matrices"
    layers: tuple[int, ...] | None = None
    engine: Engine = "auto"
    resume: bool = False
    store: Store = "bf16"
    statistics: Statistics = "fisher"
    seed: int = 0
    force: bool = False
    trust_remote_code: bool = False
    shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("group-size", self.group_size, 1)
        _at_least("batch-tokens", self.batch_tokens, 1)
        _at_least("max-shard-size", self.shard_bytes, 1)
        _at_least("seed", self.seed, 0)
        for option, value, kind in (
            ("dtype", self.dtype, DType),
            ("labels", self.labels, Labels),
            ("reduction", self.reduction, Reduction),
            ("engine", self.engine, Engine),
            ("store", self.store, Store),
            ("statistics", self.statistics, Statistics),
        ):
            _one_of(option, value, kind)
        _device(self.device)
        try:
            re.compile(self.targets)
        except re.error as error:
            raise OptionError(f"--targets {self.targets!r} is not a regular expression: {error}") from None
        if self.layers is not None and not self.layers:
            raise OptionError("--layers names no layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions:
    """What every command shares that makes a checkpoint from BASE and FT.

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
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    rest: Rest = "tuned"
    nan: OnNan = "refuse"
    seed: int = 0
    shard_bytes: int | None = None
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        _patterns("only", self.only)
        _patterns("skip", self.skip)
        _one_of("rest", self.rest, Rest)
        _one_of("nan", self.nan, OnNan)
        _at_least("seed", self.seed, 0)
        _at_least("max-shard-size", self.shard_bytes, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FapmOptions(PairOptions):
    """How ``fapm`` prunes a delta; the fields of PairOptions come first.

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
        _share("sparsity", self.sparsity)
        _share("density", self.density)
        if self.sparsity is not None and self.density is not None:
            raise OptionError("--sparsity and --density say the same thing; give one of them")
        _one_of("metric", self.metric, Metric)
        _one_of("scope", self.scope, Scope)
        if not self.selects and self.scope != "tensor":
            raise OptionError(f"--scope {self.scope} is for metrics that select; {self.metric} has no quota")

    @property
    def selects(self) -> bool:
        """Whether the metric keeps entries as they are; the others rescale or interpolate."""
        return self.metric in ("fapm", "relative", "magnitude", "random")

    def kept_share(self, default_sparsity: float) -> Fraction:
        """The share of entries that is kept, exactly."""
        if self.density is not None:
            return exact_share(self.density)
        return 1 - exact_share(default_sparsity if self.sparsity is None else self.sparsity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions(PairOptions):
    """What ``merge`` does to a delta, in this order; the fields of PairOptions come first.

    Attributes:
        mask: a mask file; entries that may not change stay the base's.
        subspace: a subspace file; what lies in its directions is removed from the delta.
        side: of which directions: of outputs (``left``), of inputs (``right``), or of either.
        layer_scale: a ``layer_importance.json``; the delta of a layer is scaled by ``(median(I) / I_layer)^power``,
            I being the mean Fisher of a layer's weights, clipped to ``[floor, 1]``.
        power: see above.
        floor: see above.
        alpha: all of the delta is scaled by it; alone it is Wise-FT's interpolation.
    """

    mask: Path | None = None
    subspace: Path | None = None
    side: Side = "both"
    layer_scale: Path | None = None
    power: float = 0.5
    floor: float = 0.1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _paths(self, "mask", "subspace", "layer_scale")
        _one_of("side", self.side, Side)
        _share("floor", self.floor)
        for option, value in (("power", self.power), ("alpha", self.alpha)):
            if not (isinstance(value, int | float) and -1e6 < value < 1e6):
                raise OptionError(f"--{option} must be a finite number, not {value}")
        if self.power < 0:
            raise OptionError(f"--power must not be negative, not {self.power}: important layers would change most")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """How ``mask`` selects, with presets and defaults filled in.

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
"""Direction, keep, aggregate and scope of what was published; see methods.masks."""
SHIELD: tuple[Basis, float, float] = ("activation", 0.99, 0.2)
"""Basis, energy and pull of the preset ``shield``; see methods.masks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """What ``mask`` makes of a Fisher: a binary mask, or with ``svd_rank`` or ``svd_energy`` a subspace.

    Attributes:
        train: ``top``: what scores highest may change, all else is frozen (a Fisher of the *new* task).
        protect: ``top``: what scores highest is frozen, all else may change (a Fisher of *old* abilities).
        preset: ``fggm``, ``fish``, ``ssu`` or ``shield``; what is given besides wins over it.
        keep: share of the units that are the top, above 0 and below 1; None for the preset's, or 0.3.
        aggregate: see Selection; None for the preset's, or ``input``.
        combine: see Selection; None for ``sum``.
        scope: see Selection; None for the preset's, or ``tensor``.
        score: what is ranked; see methods.masks.
        weights: the model's checkpoint, for scores and bases that look at the weights.
        against: a second Fisher; units are ranked by how far the first exceeds it.
        contrast: how the two are compared; None for ``ratio``.
        svd_rank: singular modes per matrix.
        svd_energy: as many modes as hold this share of a matrix's sum of squares, above 0 and at most 1.
        pull: how hard an update is drawn back out of the directions of the basis ``activation``, above 0; see
            training.rules.pull. None for a hard subspace, of which an update stays out.
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
    weights: str | None = None
    against: Path | None = None
    contrast: Contrast | None = None
    svd_rank: int | None = None
    svd_energy: float | None = None
    pull: float | None = None
    basis: Basis | None = None
    delta: str | None = None
    activations: Path | None = None
    side: Side | None = None
    device: str = "auto"
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        _paths(self, "against", "activations")
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
                _one_of(option, value, kind)
        _at_least("seed", self.seed, 0)
        _device(self.device)
        if self.preset == "shield":
            self._fill_shield()
        if self.is_subspace:
            self._check_subspace()
        else:
            self._check_mask()

    @property
    def is_subspace(self) -> bool:
        """Whether directions are protected, not entries."""
        return self.svd_rank is not None or self.svd_energy is not None

    @property
    def reads_activations(self) -> bool:
        """Whether the basis is one of activations."""
        return self.basis in ("activation", "kron")

    @property
    def stored_side(self) -> Side:
        """Which modes are stored."""
        return self.side or ("right" if self.basis == "activation" else "both")

    @property
    def selection(self) -> Selection:
        """How a binary mask selects."""
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
        _at_least("svd-rank", self.svd_rank, 1)
        if self.svd_energy is not None and not 0 < self.svd_energy <= 1:
            raise OptionError(f"--svd-energy must lie above 0 and not above 1, not {self.svd_energy}")
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
                raise OptionError(f"--pull {self.pull} is for --basis activation, not for --basis {basis}")

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
    """What ``export`` writes for other tools.

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
        _one_of("to", self.to, ExportTarget)
        if not 0 < self.learning_rate < 1:
            raise OptionError(f"--learning-rate must lie between 0 and 1, not {self.learning_rate}")
