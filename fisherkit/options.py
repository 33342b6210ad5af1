"""What a caller may choose, as frozen dataclasses that check themselves.

Standard library only: building options must not import torch.
"""

import dataclasses
import json
import re
from typing import Any, Literal, get_args

from fisherkit.errors import OptionError

Loss = Literal["auto", "all", "completion", "assistant"]
Labels = Literal["data", "sampled"]
Reduction = Literal["mean", "sum"]
Engine = Literal["auto", "stream", "resident"]
Store = Literal["bf16", "fp32"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
ChatTemplate = Literal["auto", "on", "off"]


def _one_of(option: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise OptionError(f"--{option} must be one of {', '.join(get_args(kind))}, not {value!r}")


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise OptionError(f"--{option} must be at least {least}, not {value}")


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
        ):
            _one_of(option, value, kind)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?", self.device):
            raise OptionError(f"--device takes auto, cpu, cuda or cuda:N, not {self.device!r}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise OptionError(f"--targets {self.targets!r} is not a regular expression: {error}") from None
        if self.layers is not None and not self.layers:
            raise OptionError("--layers names no layer")
