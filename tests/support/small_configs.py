"""Small configs of every causal language model that transformers has, made from its default config.

A field that sets a size gets a small value under its usual name. What an architecture needs beyond that (sizes that
must fit each other) is written down in ``OWN``.
"""

from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), 400),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "model_max_length", "max_seq_len"), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "d_kv", "swa_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("dff", "ffn_hidden_size", "intermediate_size_mlp", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    "qk_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    "mamba_headdim": 16,
    "lru_width": 32,
    "hidden_size_per_layer_input": 8,
    "hidden_size_global": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 4),
    **dict.fromkeys(("projection_dim", "projector_hidden_size", "out_hidden_size", "mm_hidden_size"), 32),
    "depth": 2,
    "embed_dim": 32,
}

PREFIX_MODELS = ("paligemma",)
"""Read their prompt to both sides unless token types say where it ends."""

LARGEST = 40_000_000
"""Parameters of a small model, at most: some have towers that do not get smaller."""

TOWER: dict[str, Any] = {"num_hidden_layers": 1, "num_layers": 1, "n_layer": 1, "encoder_layers": 1}
"""Not measured, so as small as can be."""

_MIXED = ["sliding_attention", "full_attention"] * 2
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SHARED = {"layer_types": _MIXED, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4}
_ASSISTANT = {"num_hidden_layers": 4, "layer_types": _MIXED, "num_kv_shared_layers": 4, "vocab_size_per_layer_input": 0}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "chameleon": {"vocabulary_map": {"<image>": 5}, "vq_config": {"base_channels": 32}},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4, "rope_parameters": {"full_attention": _MROPE}},
    "cohere_compass": {
        "text_config": {"layer_types": ["full_attention"] * 4, "rope_parameters": {"full_attention": _MROPE}}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]}}
    },
    "emu3": {"vocabulary_map": {"<image>": 5}, "vq_config": {"base_channels": 32}},
    "falcon_h1": {"mamba_d_ssm": 64, "ssm_multipliers": [1.0, 0.5, 2.0, 1.5, 0.7], "mlp_multipliers": [0.9, 1.1]},
    "gemma3n": {"text_config": _SHARED | {"laurel_rank": 4}},
    "gemma3n_text": _SHARED | {"laurel_rank": 4},
    "gemma4_assistant": {"text_config": _ASSISTANT | {"hidden_size_per_layer_input": 0}, "backbone_hidden_size": 32},
    "gemma4_unified_assistant": {"text_config": {"layer_types": _MIXED}, "backbone_hidden_size": 32},
    **{key: {"text_config": {"rope_parameters": _MROPE}} for key in ("glm46v", "glm4v", "glm_ocr", "glmga")},
    **{key: {"text_config": {"rope_parameters": _MROPE}} for key in ("paddleocr_vl", "qwen2_5_vl", "qwen2_vl")},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE | {"mrope_section": [1, 1, 0]}}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": _MROPE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config": {"cross_attention_layers": [1, 3]}},
    "janus": {"vq_config": {"base_channels": 32}},
    "ministral": {"head_dim": 8},
    "mistral4": {"text_config": {"head_dim": 16}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "step3p7": {"text_config": {"sliding_window": 4, "num_sliding_attention_heads": 4}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
        "mamba_dt_rank": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """Types of config that the engine takes for a causal language model, with or without towers."""
    types = {c.model_type for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) for c in auto._model_mapping}
    return sorted(types)


def small_config(model_type: str) -> Any:
    """A small config of this type; the rest of it is transformers' default."""
    kind = CONFIG_MAPPING[model_type]
    own = OWN.get(model_type, {})
    try:
        default = kind()
    except Exception:  # some defaults do not pass their own checks
        default = kind(**own)
    return kind(**_merged(_small(default), own))


def _small(config: Any, sizes: dict[str, Any] = SMALL) -> dict[str, Any]:
    given = config.to_dict()
    changes = {key: sizes[key] for key, value in given.items() if key in sizes and type(value) in (int, type(None))}
    changes = {k: v for k, v in changes.items() if given[k] is not None or k in ("num_key_value_heads",)}
    if "kv_lora_rank" in given and "num_key_value_heads" in given:  # latent attention has no groups
        changes["num_key_value_heads"] = sizes["num_attention_heads"]
    if given.get("is_decoder") is False and not given.get("is_encoder_decoder"):
        changes["is_decoder"] = True  # an encoder that can be used as a causal model
    rope = given.get("rope_parameters") or {}
    if isinstance(rope, dict) and "mrope_section" in rope:
        changes["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if hasattr(part, "to_dict"):
            changes[key] = _small(part, SMALL if "text" in key or "decoder" in key else SMALL | TOWER)
            if hasattr(part, "model_type") and part.model_type:
                changes[key]["model_type"] = part.model_type
    return changes


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        merged[key] = _merged(merged[key], value) if isinstance(value, dict) and key in merged else value
    return merged
