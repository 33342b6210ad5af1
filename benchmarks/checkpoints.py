"""Checkpoints to measure on: Llamas with random weights, of any size, written shard by shard."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec


def make(folder: Path, *, blocks: int, hidden: int, intermediate: int, dtype: str, vocabulary: int = 8192) -> Path:
    """A Llama checkpoint in shards with a byte-level tokenizer; made once, then reused."""
    if (folder / "config.json").is_file():
        return folder
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {
            n: tuple(p.shape) for n, p in transformers.AutoModelForCausalLM.from_config(config).named_parameters()
        }
    code = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    specs = [TensorSpec(name, code, shape) for name, shape in shapes.items()]
    work = folder.with_name(folder.name + ".partial")
    generator = torch.Generator().manual_seed(0)
    with StreamedWriter.create(folder, specs, work=work, shard_bytes=500_000_000) as writer:
        for name, shape in shapes.items():
            values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            writer.write(name, values)
        writer.finish()
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompts(path: Path, *, samples: int, tokens: int) -> Path:
    """Prompts longer than ``tokens``, to be cut at ``--max-length tokens``: every sample is of the same length."""
    letters = random.Random(0)
    rows = ["".join(letters.choices("abcdefghij klmnop qrstuv wxyz", k=tokens + 8)) for _ in range(samples)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: enough to measure time with."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
