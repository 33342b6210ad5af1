"""Detection of quantised checkpoints, whose weights cannot be computed with as they lie there.

Standard library only. Schemes known by their tensors: FP8 (DeepSeek, Qwen), GPTQ, AWQ, bitsandbytes in 4 and 8 bits,
compressed-tensors, HQQ, MXFP4 (gpt-oss).
"""

from collections.abc import Mapping
from typing import Any

from fisherkit.checkpoint.headers import TensorInfo
from fisherkit.checkpoint.index import CheckpointIndex
from fisherkit.errors import CheckpointError

DEQUANTISE = (
    "dequantise it first: AutoModelForCausalLM.from_pretrained(ID, dtype='bfloat16', "
    "quantization_config=<its config with dequantize=True>).save_pretrained(FOLDER), or take the bf16 release"
)

_LEAVES = frozenset(
    (
        *("weight_scale_inv", "weight_scale", "weight_packed", "weight_zero_point", "qweight", "qzeros", "scales"),
        *("g_idx", "W_q", "SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    )
)
_ENDINGS = ("_blocks", "_scales")  # MXFP4: gate_up_proj_blocks beside gate_up_proj_scales


def quantised_tensor(index: CheckpointIndex) -> TensorInfo | None:
    """Return the first tensor of the checkpoint that is a quantised weight or a scale of one."""
    return next((info for info in index.tensors.values() if _is_quantised(info)), None)


def refuse_quantised(index: CheckpointIndex, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the checkpoint is quantised, by its tensors or by its config.json.

    Args:
        index: the checkpoint.
        config: its config.json; empty where there is none.
    """
    scheme = next((part["quantization_config"] for part in _parts(config) if part.get("quantization_config")), None)
    method = f" ({scheme.get('quant_method', 'unnamed')})" if isinstance(scheme, Mapping) else ""
    tensor = quantised_tensor(index)
    if tensor is not None:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} ({tensor.dtype}): the checkpoint is quantised{method}; {DEQUANTISE}"
        )
    if scheme is not None:
        raise CheckpointError(
            f"{index.path}: its config.json calls it quantised{method}, though no tensor is; "
            "remove quantization_config there if these are plain weights"
        )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config, *(part for part in config.values() if isinstance(part, Mapping))]


def _is_quantised(info: TensorInfo) -> bool:
    leaf = info.name.rpartition(".")[2]
    if info.dtype.startswith(("F8_", "F6_", "F4")) or leaf in _LEAVES:
        return True
    # Weights packed into bytes; masks and other buffers of bytes are no weights by their names.
    return info.dtype in ("U8", "I8") and (leaf.endswith(_ENDINGS) or (leaf == "weight" and len(info.shape) > 1))
