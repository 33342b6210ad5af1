"""Small real checkpoints, made here from configs: every architecture that extract is promised for."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM

VOCABULARY = 400  # that of tiny_tokenizers
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
_GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4, "global_head_dim": 16}


def _make(config: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, config)(**{**_BASE, **changes})


def _gemma4_multimodal() -> Any:
    text = (
        _BASE
        | _GEMMA4
        | {
            "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "vocab_size_per_layer_input": VOCABULARY,
        }
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "num_key_value_heads": 2,
    }
    return transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _make("LlamaConfig"),
    "llama-tied": _make("LlamaConfig", tie_word_embeddings=True),
    "qwen2": _make("Qwen2Config"),
    "qwen3": _make("Qwen3Config"),
    "qwen3-moe": _make("Qwen3MoeConfig", **_EXPERTS),
    "mixtral": _make("MixtralConfig", num_local_experts=4),
    "mistral": _make("MistralConfig", sliding_window=4),
    "phi3": _make("Phi3Config"),
    "gemma2": _make("Gemma2Config", sliding_window=4, query_pre_attn_scalar=8, tie_word_embeddings=True),
    "gemma3": _make(
        "Gemma3TextConfig",
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
    ),
    "gemma4-31b": _gemma4_multimodal,
    "gemma4-e2b": _make(
        "Gemma4TextConfig",
        **_GEMMA4,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        tie_word_embeddings=True,
        use_double_wide_mlp=True,
    ),
    "gemma4-moe": _make(
        "Gemma4TextConfig",
        **_GEMMA4,
        num_hidden_layers=4,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCABULARY,
        tie_word_embeddings=True,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt-neox": _make("GPTNeoXConfig"),
    "olmo2": _make("Olmo2Config"),
    "granite": _make("GraniteConfig", residual_multiplier=0.5, logits_scaling=2.0),
    "cohere": _make("CohereConfig", tie_word_embeddings=True),
    "glm4": _make("Glm4Config"),
    "smollm3": _make("SmolLM3Config"),
    "starcoder2": _make("Starcoder2Config"),
}
_GPTJ = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
ODD: dict[str, Callable[[], Any]] = {  # opt flattens what wide layers read, and does not call them in order
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "gptj": lambda: transformers.GPTJConfig(**_GPTJ),  # keeps its sines in a forward, as the next three do
    "codegen": lambda: transformers.CodeGenConfig(**_GPTJ),
    "ctrl": lambda: transformers.CTRLConfig(
        vocab_size=VOCABULARY, n_embd=32, dff=48, n_layer=3, n_head=4, n_positions=64
    ),
    "phi3-longrope": _make(
        "Phi3Config",
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 32,
        },
    ),
}
"""Models of which something here was once wrong; few tests need them."""


def build(architecture: str, seed: int = 0) -> Any:
    """A model with random weights, norms and biases included, so that no gradient is zero by accident."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((CONFIGS | ODD)[architecture]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def save(
    architecture: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "40KB", seed: int = 0
) -> Path:
    """Save it as users have it: sharded, with index, config and tokenizer."""
    build(architecture, seed).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


PROMPTS = (
    "Name three rivers.",
    "What is two plus two?",
    "Yes.",
    "Good morning to you all, what is the capital?",
    "No!",
)


def write_prompts(path: Path, prompts: Sequence[str] = PROMPTS) -> Path:
    """A prompt set of different lengths."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path
