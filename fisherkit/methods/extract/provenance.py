"""Provenance of a Fisher, as the JSON beside it has it, and the fingerprint that two runs must have in common."""

import dataclasses
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

from fisherkit._version import __version__
from fisherkit.artefacts import fisher_sidecar
from fisherkit.engine.model.config import choose_dtype
from fisherkit.methods.extract.prepare import Prepared, sha256

_NOT_THE_RESULT = ("force", "resume", "trust_remote_code", "device", "limit", "dtype", "memory", "device_memory")
"""Options that a resumed run may be given anew: they make no other result, or follow from something else below."""


def fingerprint(prepared: Prepared) -> dict[str, str]:
    """Return what must be the same for a killed run to go on, by what a person would call it."""
    options = dataclasses.asdict(prepared.options)
    for name in _NOT_THE_RESULT:
        options.pop(name)
    assert prepared.skeleton.index is not None
    assert prepared.prompts is not None
    together = {"number of ranks": str(prepared.ranks.size)} if prepared.ranks.described() else {}
    return {
        "model": prepared.skeleton.index.fingerprint() + _config_sha256(prepared),
        "prompts": prepared.prompts.report.sha256,
        "options": json.dumps(options, sort_keys=True),
        "device": prepared.device.type,
        "dtype": str(prepared.skeleton.dtype).removeprefix("torch."),
        "versions": f"fisherkit {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        **together,
    }


def digest(found: Mapping[str, str]) -> str:
    """Return one SHA-256 for a whole fingerprint, as the sidecar of a finished run has it."""
    return sha256(json.dumps(dict(found), sort_keys=True))


def provenance(prepared: Prepared, mode: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sidecar without what is known of the finished file.

    Args:
        prepared: the run.
        mode: ``engine`` that was used and ``reason``.
    """
    options, skeleton = prepared.options, prepared.skeleton
    assert skeleton.index is not None
    assert prepared.prompts is not None
    report = dataclasses.asdict(prepared.prompts.report)
    return {
        "format": fisher_sidecar.FORMAT,
        "fisherkit": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "kind": "fisher",
        "model": {
            "id": prepared.source.id,
            "revision": prepared.source.revision,
            "architecture": type(skeleton.model).__name__,
            "head_dim": _head_dim(skeleton.model.config.get_text_config()),
            "config_sha256": _config_sha256(prepared),
            "weights_sha256": skeleton.index.fingerprint(),
            "dtype": str(choose_dtype(None, skeleton.index, "auto")).removeprefix("torch."),
            "tokenizer_sha256": prepared.tokenizer_sha256,
            "chat_template_sha256": report["template_sha256"],
        },
        "prompts": report,
        **({"part": prepared.part.as_json()} if prepared.part is not None else {}),
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
            "group_size": len(prepared.plan.groups[0]),
            "batch_tokens": options.batch_tokens,
            "dtype": str(skeleton.dtype).removeprefix("torch."),
            "device": _device_name(prepared.device),
            "accumulate": "float32",
            "store": options.store,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            **prepared.ranks.described(),
        },
        "blocks": skeleton.blocks_path,
        "layers": len(skeleton.blocks),
    }


def _config_sha256(prepared: Prepared) -> str:
    return sha256(prepared.skeleton.model.config.to_json_string())


def _head_dim(config: Any) -> int | None:
    """Return the size of an attention head, by which drawings of a mask find the heads; None where layers differ."""
    heads = getattr(config, "num_attention_heads", None)
    try:
        own = getattr(config, "head_dim", None)
    except Exception:  # transformers refuses to name one size where layers have several (Gemma 4)
        return None
    if isinstance(own, int):
        return own
    return config.hidden_size // heads if isinstance(heads, int) and heads and hasattr(config, "hidden_size") else None


def _device_name(device: torch.device) -> str:
    if device.type in ("cuda", "xpu"):
        name: str = torch.get_device_module(device).get_device_name(device)
        return name
    return str(device)
