"""Every causal language model of the installed transformers, small and random, measured and compared with the truth.

    python tests/support/architectures.py                   all of them, and the table docs/models.md
    python tests/support/architectures.py llama zamba       some of them; results go to stderr

The truth is the slow loop of ``oracle.py`` over the whole model as transformers itself loads it: in float64, or in
float32 where the model does not run in float64 or takes other paths there (a router that decides by rounding).
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import small_configs
import tiny
import torch
import transformers
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import fisherkit
from fisherkit.engine.model.build import missing_towers
from fisherkit.errors import FisherkitError
from fisherkit.options import ExtractOptions
from fisherkit.prompts.dataset import Sample, load_prompts

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
OPTIONS = ExtractOptions(store="fp32", dtype="float32", group_size=2, batch_tokens=40)
CLOSE, WRONG_FROM = 1e-5, 1e-4
ROUNDING = 1e-10  # of the largest norm: what a gradient's square is that is zero but for rounding
SECONDS = 300


@dataclass(frozen=True)
class Row:
    """How it went with one architecture.

    Attributes:
        model_type: as config.json says it.
        outcome: ``stream``, ``resident`` or ``refused``; ``untried`` where no small model could be made; ``wrong`` and
            ``crash`` are defects of ours.
        reason: of anything but ``stream``.
        difference: largest relative difference of a tensor of the Fisher, None where nothing was measured.
    """

    model_type: str
    outcome: str
    reason: str = ""
    difference: float | None = None


class Untried(Exception):  # noqa: N818 - not an error of ours
    """No small checkpoint of this architecture could be made here."""


def measure(model_type: str, folder: Path) -> Row:
    """Make a checkpoint, measure it with the command's own function, and compare."""
    try:
        model = make_checkpoint(model_type, folder / "model")
    except Untried as reason:
        return Row(model_type, "untried", str(reason))
    prompts = tiny.write_prompts(folder / "prompts.jsonl")
    try:
        report = fisherkit.extract(folder / "model", prompts, folder / "fisher.pt", OPTIONS)
    except FisherkitError as error:
        return Row(model_type, "refused", str(error).replace(f"{folder / 'model'}: ", "").replace("model: ", ""))
    found = torch.load(folder / "fisher.pt")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    difference = compare(found, model, load_prompts(str(prompts), tokenizer, OPTIONS).samples, folder / "model")
    run = report.provenance["run"]
    outcome = run["engine"] if difference < WRONG_FROM else "wrong"
    return Row(model_type, outcome, "" if outcome == "stream" else run["reason"], difference)


def make_checkpoint(model_type: str, folder: Path) -> "Model":
    """Save a small random model as users have it; of one that is refused by its config alone, just the config."""
    try:
        config = small_configs.small_config(model_type)
        tiny_tokenizer().save_pretrained(folder)
        if getattr(config, "is_encoder_decoder", False):
            config.save_pretrained(folder)
            return Model(None)
        model = Model(build(config))
    except Exception as error:
        raise Untried(" ".join(str(error).split())[:200]) from error
    model.save(folder, config)
    return model


def build(config: Any) -> Any:
    """A model with random weights on top of its own initialisation, so that no gradient is zero by accident."""
    torch.manual_seed(0)
    # Of a model with towers the checkpoint holds all, also where the text alone has a class of its own.
    whole = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    with torch.device("meta"), missing_towers():
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > small_configs.LARGEST:
        raise ValueError(f"{size:,} parameters even in its small config")
    with missing_towers():
        model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


class Model:
    """A small model and the road to its checkpoint."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def save(self, folder: Path, config: Any) -> None:
        """Save it in several shards."""
        self.model.save_pretrained(folder, max_shard_size="40KB")

    def truth(self, folder: Path, samples: list[Sample], dtype: torch.dtype) -> dict[str, Tensor]:
        """Slow Fisher of the saved checkpoint, by checkpoint names."""
        with missing_towers():
            model = type(self.model).from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
        types = model.config.model_type in small_configs.PREFIX_MODELS
        return oracle.fisher_of(model, samples, token_types=types)


def compare(found: dict[str, Tensor], model: Model, samples: list[Sample], folder: Path) -> float:
    """Largest relative difference to the truth in float64, or in float32 where that comes closer."""
    best = float("inf")
    for dtype in (torch.float64, torch.float32):
        try:
            wanted = model.truth(folder, samples, dtype)
        except RuntimeError:  # fixed to one dtype somewhere
            if dtype is torch.float32:
                raise
            continue
        smallest = ROUNDING * max(float(value.norm()) for value in wanted.values())
        best = min(best, max(_difference(value, wanted[name], smallest) for name, value in found.items()))
        if best < CLOSE:
            break
    return best


def _difference(found: Tensor, wanted: Tensor, smallest: float = 0.0) -> float:
    scale = max(float(wanted.double().norm()), smallest)
    return float((found.double() - wanted.double()).norm()) / scale if scale else float(found.any())


def run(model_types: Iterable[str]) -> Iterator[Row]:
    """Measure each in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once, here
    for model_type in model_types:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, model_type))
        process.start()
        sender.close()
        try:
            row = receiver.recv() if receiver.poll(SECONDS) else Row(model_type, "crash", f"over {SECONDS} seconds")
        except EOFError:
            row = Row(model_type, "crash", "the process died")
        process.kill()
        process.join()
        yield row


def _send(sender: Any, model_type: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = measure(model_type, Path(folder))
        except Exception as error:
            row = Row(model_type, "crash", f"{type(error).__name__}: {str(error).strip()[:200]}")
        sender.send(row)


def main() -> int:
    """Measure, and write the table where no names are given; 1 if anything was wrong or crashed."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for row in run(sys.argv[1:] or small_configs.model_types()):
        rows.append(row)
        difference = "" if row.difference is None else f" {row.difference:.1e}"
        print(f"{row.model_type}: {row.outcome}{difference} {row.reason}", file=sys.stderr, flush=True)
    if not sys.argv[1:]:
        TABLE.write_text(page(rows), encoding="utf-8")
    return int(any(row.outcome in ("wrong", "crash") for row in rows))


def page(rows: list[Row]) -> str:
    """The table as a page of the documentation."""
    parts = [HEAD.format(count=len(rows), version=transformers.__version__)]
    for outcome, title in SECTIONS.items():
        own = [row for row in rows if row.outcome == outcome]
        if own:
            columns = [column for column in COLUMNS if any(cells(row)[column] for row in own)]
            parts += [f"## {title} ({len(own)})\n", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            parts += [f"| {' | '.join(cells(row)[column] for column in columns)} |" for row in own]
            parts.append("")
    return "\n".join(parts)


def cells(row: Row) -> dict[str, str]:
    """The cells of a row, by column."""
    difference = "" if row.difference is None else f"{row.difference:.1e}"
    return {"`model_type`": f"`{row.model_type}`", "difference": difference, "why": row.reason.replace("|", "\\|")}


COLUMNS = ("`model_type`", "difference", "why")
SECTIONS = {
    "wrong": "Wrong",
    "crash": "Crashed",
    "resident": "Measured with the whole model in memory",
    "refused": "Refused",
    "untried": "Not tried, because no small config of them could be made",
    "stream": "Measured block by block",
}
HEAD = """# Models

All {count} types of causal language model that transformers {version} has, with or without vision and audio
towers (of which only the text part is measured). Of each, a small model with random weights was made from its default
config with small sizes, saved, measured by `extract` in float32, and compared with the slow truth: transformers' own
forward, one sample at a time, autograd, squared, averaged, in float64 (float32 where a model does not run in float64).
*difference* is the largest over all tensors of ||Fisher - truth|| / ||truth||.

`make architectures` makes this page again; a sample of it runs in `make test`.
"""

if __name__ == "__main__":
    sys.exit(main())
