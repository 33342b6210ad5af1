"""Order of the modules of a block as papers list them: q k v o, then gate up down, whatever the file's order is.

Files sort tensors by name (down before gate, k before q), models by construction; tables and drawings that follow this
order can be read side by side. Standard library only.
"""

import re
from collections.abc import Iterable

_PARTS = (
    re.compile(r"attn|attention"),
    re.compile(r"mixer|mamba|ssm|conv|recurrent|rglru"),
    re.compile(r"mlp|ffn|feed_forward|moe|expert"),
)
# Leaves within a part; a name stands for all models that call it so. What is not listed keeps the file's order.
_LEAVES = (
    *("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "in_proj_qkvz", "in_proj_ba", "in_proj"),
    *("q_a_proj", "q_b_proj", "q_proj", "query", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "key", "v_proj", "value"),
    *("gate", "router", "gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "fc1", "c_fc", "fc_in", "dense_h_to_4h"),
    *("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "o_proj", "out_proj", "Wo", "dense", "c_proj"),
)
_RANKS = {leaf: rank for rank, leaf in enumerate(_LEAVES)}


def module_rank(module: str) -> tuple[int, int]:
    """Return a sort key for a module inside a block, such as ``self_attn.q_proj``; equal keys keep their order.

    Matrices of attention come first, then those of recurrent layers, then the MLP's, a shared expert's after those of
    the others, then everything else: norms, biases, and modules that no rule knows.
    """
    parents, _, leaf = module.rpartition(".")
    part = next((at for at, pattern in enumerate(_PARTS) if pattern.search(parents)), None)
    if leaf not in _RANKS:
        return 2 * len(_PARTS), 0
    return (2 * part + ("shared" in parents) if part is not None else 2 * len(_PARTS) - 1), _RANKS[leaf]


def in_model_order(modules: Iterable[str]) -> tuple[str, ...]:
    """Return distinct modules in the order of ``module_rank``."""
    return tuple(sorted(dict.fromkeys(modules), key=module_rank))
