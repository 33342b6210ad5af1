"""What ``extract`` knows before it reads the first weight: model, prompts, plan, and where they come from."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from fisherkit._version import __version__
from fisherkit.artefacts import fisher_sidecar
from fisherkit.checkpoint.hub import ModelSource, resolve_model
from fisherkit.checkpoint.index import open_index
from fisherkit.engine.covariance.plan import memory_of_moments
from fisherkit.engine.model.config import choose_dtype, read_config
from fisherkit.engine.model.device import choose_device
from fisherkit.engine.model.memory import available_bytes
from fisherkit.engine.model.plan import HEADROOM, Plan, choose_targets, fit_groups, needs
from fisherkit.engine.model.skeleton import Skeleton, blocks_in_groups, build_skeleton
from fisherkit.errors import CheckpointError, OptionError, first_line
from fisherkit.options import ExtractOptions
from fisherkit.progress import Say
from fisherkit.prompts.dataset import PromptSet, load_prompts


@dataclasses.dataclass
class Run:
    """Everything that is known before the first weight is read."""

    source: ModelSource
    skeleton: Skeleton
    tokenizer_sha256: str
    prompts: PromptSet
    plan: Plan
    device: torch.device
    options: ExtractOptions

    def fingerprint(self) -> dict[str, str]:
        """What must be the same for a killed run to go on, by what a person would call it."""
        options = dataclasses.asdict(self.options)
        for name in ("force", "resume", "trust_remote_code", "device", "limit"):
            options.pop(name)
        assert self.skeleton.index is not None
        return {
            "model": self.skeleton.index.fingerprint() + sha256(self.skeleton.model.config.to_json_string()),
            "prompts": self.prompts.report.sha256,
            "options": json.dumps(options, sort_keys=True),
            "device": self.device.type,
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        }

    def provenance(self, out: Path, files: Sequence[Path], mode: Mapping[str, Any]) -> dict[str, Any]:
        """Where the numbers come from; the sidecar without its statistics."""
        options, report = self.options, dataclasses.asdict(self.prompts.report)
        assert self.skeleton.index is not None
        return {
            "format": fisher_sidecar.FORMAT,
            "fisherkit": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "kind": "fisher",
            "file": out.name,
            "file_bytes": sum(file.stat().st_size for file in files if file.suffix != ".json"),
            "model": {
                "id": self.source.id,
                "revision": self.source.revision,
                "architecture": type(self.skeleton.model).__name__,
                "config_sha256": sha256(self.skeleton.model.config.to_json_string()),
                "weights_sha256": self.skeleton.index.fingerprint(),
                "dtype": str(choose_dtype(None, self.skeleton.index, "auto")).removeprefix("torch."),
                "tokenizer_sha256": self.tokenizer_sha256,
                "chat_template_sha256": report["template_sha256"],
            },
            "prompts": report,
            "estimator": {
                "name": "empirical" if options.labels == "data" else "sampled",
                "formula": "F_i = 1/N sum_n (d l_n / d theta_i)^2, l_n the negative log-likelihood of sample n",
                "labels": options.labels,
                "reduction": options.reduction,
                "targets": options.targets,
                "layers": list(options.layers) if options.layers is not None else None,
                "seed": options.seed,
            },
            "run": {
                "engine": mode["engine"],
                "reason": mode["reason"],
                "group_size": len(self.plan.groups[0]),
                "batch_tokens": options.batch_tokens,
                "dtype": str(self.skeleton.dtype).removeprefix("torch."),
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
                "accumulate": "float32",
                "store": options.store,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "blocks": self.skeleton.blocks_path,
            "layers": len(self.skeleton.blocks),
        }

    def weights_fit(self) -> bool:
        """Whether an accelerator can keep all weights between the two sweeps; on a CPU the page cache does."""
        if self.device.type == "cpu":
            return False
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.skeleton.model.parameters())
        need = needs(
            self.skeleton,
            self.plan,
            batch_tokens=self.options.batch_tokens,
            longest=self.options.max_length,
            on_host=False,
            moments=covariance_memory(self.skeleton, self.plan, self.options),
        )
        return bool(weights + need.device <= HEADROOM * available_bytes(self.device))


def prepare(model: str, prompts: str, options: ExtractOptions, say: Say) -> Run:
    """Look at everything and decide everything; reads headers, prompts and config, but no weights."""
    source = resolve_model(model)
    config = read_config(source.path, trust_remote_code=options.trust_remote_code)
    index = open_index(source.path)
    device = choose_device(options.device)
    dtype = choose_dtype(config, index, options.dtype)
    skeleton = build_skeleton(config, index, dtype, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(source, options)
    samples = load_prompts(prompts, tokenizer, options)
    say(samples.report.line())
    longest = max(len(sample.ids) for sample in samples.samples)
    _check_fit(source, skeleton, samples, longest)
    plan = make_plan(skeleton, options, device, longest, say)
    say(
        f"{source.id}: {len(plan.tensors):,} tensors, {plan.parameters:,} weights in {len(skeleton.blocks)} layers, "
        f"{str(dtype).removeprefix('torch.')} on {device}, {len(plan.groups)} groups of {len(plan.groups[0])} layers"
    )
    return Run(source, skeleton, hash_tokenizer(tokenizer), samples, plan, device, options)


def _check_fit(source: ModelSource, skeleton: Skeleton, prompts: PromptSet, longest: int) -> None:
    """Refuse samples that the model has no embeddings or no positions for."""
    largest = max(max(sample.ids) for sample in prompts.samples)
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise CheckpointError(
            f"{source.path}: the tokenizer gives token {largest}, but the model embeds only {rows}; "
            "the tokenizer belongs to another model"
        )
    positions = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise OptionError(f"--max-length {longest}: the model has {positions} positions; use --max-length {positions}")


def make_plan(skeleton: Skeleton, options: ExtractOptions, device: torch.device, longest: int, say: Say) -> Plan:
    """Targets and groups; a group size that would not fit the memory is lowered, and said."""
    targets = choose_targets(skeleton, options.targets, options.layers)
    wanted = Plan(blocks_in_groups(len(skeleton.blocks), options.group_size), targets)
    plan = fit_groups(
        skeleton,
        wanted,
        options.group_size,
        available_bytes(device),
        batch_tokens=options.batch_tokens,
        longest=longest,
        on_host=device.type == "cpu",
        moments=covariance_memory(skeleton, wanted, options),
    )
    if len(plan.groups) != len(wanted.groups):
        say(f"group size lowered from {options.group_size} to {len(plan.groups[0])}: more would not fit the memory")
    return plan


def covariance_memory(skeleton: Skeleton, plan: Plan, options: ExtractOptions) -> dict[int | None, int]:
    """What second moments take in memory, see ``memory_of_moments``; nothing where none are gathered."""
    return memory_of_moments(skeleton, plan) if options.statistics == "activations" else {}


def load_tokenizer(source: ModelSource, options: ExtractOptions) -> Any:
    """The tokenizer beside the model. Raises CheckpointError when there is none."""
    folder = source.path if source.path.is_dir() else source.path.parent
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=options.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: no tokenizer that transformers can load ({first_line(error)}); "
            "save it beside the model with tokenizer.save_pretrained(FOLDER)"
        ) from error


def sha256(text: str) -> str:
    """Of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """Of all that decides how a tokenizer splits text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return sha256(backend.to_str())
    return sha256(json.dumps(sorted(tokenizer.get_vocab().items())))
