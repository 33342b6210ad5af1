"""Options of ``extract``."""

import dataclasses
from typing import Any, Literal, Self

from fisherkit.errors import OptionError
from fisherkit.options.checks import at_least, check_device, check_patterns, one_of
from fisherkit.options.fields import check_json, parse_field
from fisherkit.options.part import Part, check_part

Loss = Literal["auto", "all", "completion", "assistant"]
Labels = Literal["data", "sampled"]
Reduction = Literal["mean", "sum"]
Engine = Literal["auto", "stream", "resident"]
Store = Literal["auto", "bf16", "fp32", "bfloat16", "float32"]
Statistics = Literal["fisher", "activations", "inputs"]
DType = Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
ChatTemplate = Literal["auto", "on", "off"]

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LEAST_BATCH, _DEVICE_BATCH = 1024, 8192  # tokens per batch, unless told otherwise
STORES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Options that turn a prompt set into token ids, with marks on the tokens that count in the loss.

    Attributes:
        field: the column to read; columns by what they hold, as ``prompt=question,context=passage,completion=answer``
            (``system`` too; a context that is named first stands first); or None to detect them from the first row.
        limit: use the first so many rows; 0 or None for all (None after construction).
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
        at_least("limit", self.limit, 0)
        if self.limit == 0:
            object.__setattr__(self, "limit", None)
        at_least("max-length", self.max_length, 2)
        one_of("chat-template", self.chat_template, ChatTemplate)
        one_of("loss", self.loss, Loss)
        parse_field(self.field or "")
        check_json("chat-template-kwargs", self.chat_template_kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(PromptOptions):
    """Options of commands that run a model on prompts, block by block; the fields of PromptOptions come first.

    Attributes:
        group_size: decoder blocks whose weights are resident at a time, with all that is gathered on them; lowered
            when they do not fit.
        batch_tokens: padded tokens per batch (samples of similar length share one); never changes the result. None for
            1,024 on a CPU, and on other devices 8,192: they are fast only where there is much to do at a time.
        dtype: what the model computes in; ``auto`` is the checkpoint's own, or float32 on a CPU that is far faster in
            that; ``bf16`` is short for ``bfloat16``, and so on (the long name after construction). Sums are always
            taken in float32 or more.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``, ``mps``.
        engine: ``stream`` (block by block), ``resident`` (whole model), or ``auto``.
        resume: continue what a killed run left in ``<out>.partial/``.
        force: replace an existing output.
        trust_remote_code: run Python code that ships with the checkpoint.
    """

    group_size: int = 8
    batch_tokens: int | None = None
    dtype: DType = "auto"
    device: str = "auto"
    engine: Engine = "auto"
    resume: bool = False
    force: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("group-size", self.group_size, 1)
        if self.batch_tokens is not None:
            at_least("batch-tokens", self.batch_tokens, 1)
        one_of("dtype", self.dtype, DType)
        one_of("engine", self.engine, Engine)
        object.__setattr__(self, "dtype", _DTYPES.get(self.dtype, self.dtype))
        check_device(self.device)

    def on(self, device_type: str) -> Self:
        """Return the options for a device such as ``cuda``: with a number of tokens per batch, if there is none."""
        if self.batch_tokens is not None:
            return self
        return dataclasses.replace(self, batch_tokens=LEAST_BATCH if device_type == "cpu" else _DEVICE_BATCH)

    @property
    def tokens_per_batch(self) -> int:
        """``batch_tokens``, or the least that is chosen."""
        return self.batch_tokens or LEAST_BATCH


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractOptions(RunOptions):
    """Options of ``extract``; the fields of RunOptions come first.

    Attributes:
        labels: ``data`` (empirical Fisher) or ``sampled`` from the model's own distribution (true Fisher, one draw).
        reduction: the loss of a sample is the ``mean`` or the ``sum`` over its loss tokens.
        targets: ``matrices``, ``all``, or a regular expression searched in checkpoint tensor names.
        layers: block numbers to measure, or None for all.
        store: dtype of the file, ``bf16`` or ``fp32`` (``bfloat16`` and ``float32`` become these); ``auto`` is bf16,
            and fp32 for a part and for whole covariances (one of these two after construction).
        shard: measure one of several parts of the samples, (3, 16) being the third of sixteen; ``combine`` adds the
            parts. None measures them all.
        memory: bytes of memory to plan with, at most; None for what there is.
        device_memory: the same of an accelerator's own memory.
        statistics: ``fisher``; or ``activations``: beside it the second moments of what goes into every matrix and of
            the gradients at what comes out; or ``inputs``: those of what goes in alone, by one forward.
        rank: of ``inputs``: keep a factor of so many columns of each instead of all of it.
        seed: seed of sampled labels.
        shard_bytes: largest shard when the output is a folder.
    """

    labels: Labels = "data"
    reduction: Reduction = "mean"
    targets: str = "matrices"
    layers: tuple[int, ...] | None = None
    store: Store = "auto"
    shard: Part | tuple[int, int] | None = None
    memory: int | None = None
    device_memory: int | None = None
    statistics: Statistics = "fisher"
    rank: int | None = None
    seed: int = 0
    shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("max-shard-size", self.shard_bytes, 1)
        at_least("seed", self.seed, 0)
        at_least("memory", self.memory, 1)
        at_least("device-memory", self.device_memory, 1)
        for option, value, kind in (
            ("labels", self.labels, Labels),
            ("reduction", self.reduction, Reduction),
            ("store", self.store, Store),
            ("statistics", self.statistics, Statistics),
        ):
            one_of(option, value, kind)
        if self.shard is not None:
            object.__setattr__(self, "shard", check_part("shard", self.shard))
        self._check_store()
        check_patterns("targets", (self.targets,))
        if self.layers is not None and not self.layers:
            raise OptionError("--layers names no layer")

    def _check_store(self) -> None:
        """Settle how the file is stored: parts and whole covariances in float32, the rest in bfloat16."""
        whole = self.statistics == "inputs" and self.rank is None
        automatic = "fp32" if whole or self.shard is not None else "bf16"
        object.__setattr__(self, "store", automatic if self.store == "auto" else STORES.get(self.store, self.store))
        at_least("rank", self.rank, 1)
        if self.rank is not None and self.statistics != "inputs":
            raise OptionError("--rank is for --statistics inputs")
        if whole and self.store != "fp32":
            raise OptionError(
                "--store bf16 would leave a whole covariance indefinite: its small eigenvalues drown in rounding; give "
                "--rank too, which keeps factors"
            )
