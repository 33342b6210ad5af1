"""The demo model: a small real Llama, trained here in about a minute and saved as users have theirs.

Nothing is downloaded: the text is ``demo_text``'s, the tokenizer is trained on it too. What extract and inspect make
of the model is none of this module's business; to them it is a checkpoint like any other.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.target import swap_in
from fisherkit.errors import CheckpointError, OutputError
from fisherkit.methods.demo_text import Corpus, read_corpus

Track = Callable[[str, int, int], None]
Say = Callable[[str], None]

_BOS, _EOS, _END = "<s>", "</s>", "<|end|>"
_ROLES = ("system", "user", "assistant")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_MARK = "fisherkit_demo"  # a key in config.json: what carries it is ours to reuse and to replace


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How large the demo model is and how long it learns.

    Attributes:
        vocabulary: tokens, special ones included; more than 262.
        hidden: width of the residual stream; a multiple of 64.
        layers: decoder blocks; 12 make two groups of the default size of 8.
        steps: optimizer steps at most, of one window each; a fast machine is done before its time is up.
        window: tokens per window.
        held_out: windows kept from training, for the loss that is told.
        learning_rate: of AdamW, at its height.
        embedding_rate: the same for the embedding, whose rows are met too rarely to learn at the other.
        seed: of the weights and of the order of the text.
    """

    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 12
    steps: int = 1600
    window: int = 256
    held_out: int = 8
    learning_rate: float = 2e-3
    embedding_rate: float = 3e-2
    seed: int = 0


def make_model(
    folder: Path,
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
    seconds: float = 60.0,
    recipe: Recipe | None = None,
) -> Path:
    """Train a small Llama on what every Python has to read, or reuse the one that is there.

    Training stops after ``seconds`` or the recipe's steps, whichever comes first, so the weights differ from one
    machine to another. They are saved in bf16, in three shards or more, with tokenizer and chat template, beside
    their place and renamed when whole.

    Args:
        folder: made if need be; the model is its subfolder ``model``.
        track: progress, called with stage, done and total.
        say: gets the lines meant for a person.
        seconds: wall time of the training loop.
        recipe: size and schedule; the default has 2.9 million weights.

    Returns:
        ``folder / "model"``.

    Raises:
        OutputError: the place is taken by something else, or cannot be written.
    """
    target = folder / "model"
    if _is_reusable(target):
        say(f"{target}: made by an earlier run, used again (delete it to train anew)")
        return target
    with _written_aside(target) as staged:  # a place that cannot be written shows before the training, not after
        _save(*_make(recipe or Recipe(), seconds, track, say), staged)
    say(f"{target}: saved in {len(list(target.glob('*.safetensors')))} shards, with tokenizer and chat template")
    return target


def _make(recipe: Recipe, seconds: float, track: Track, say: Say) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    corpus = read_corpus()
    tokenizer = _train_tokenizer(corpus, recipe.vocabulary)
    windows = _windows(corpus, tokenizer, recipe)
    model = _new_model(recipe, tokenizer)
    say(
        f"Training a Llama of {model.num_parameters() / 1e6:.1f} million weights on Python's documentation and sources "
        f"({windows.numel() / 1e6:.1f} million tokens, {seconds:.0f} seconds at most)"
    )
    with _one_thread():
        _train(model, windows, recipe, seconds, track, say)
    return model, tokenizer


# Where it goes.


def _is_reusable(target: Path) -> bool:
    """Whether a whole demo model is there; raises OutputError for anything that is not ours to replace."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        ours = _MARK in json.loads((target / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise OutputError(f"{target}: is not a model of the demo; choose another --folder")
    try:
        open_index(target)
    except CheckpointError:
        return False
    return all((target / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model = model.to(torch.bfloat16)
    shard_bytes = sum(tensor.nbytes for tensor in model.state_dict().values()) // 3
    with _no_progress_bar():
        model.save_pretrained(folder, max_shard_size=shard_bytes)
    tokenizer.save_pretrained(folder)
    for shard in folder.glob("*.safetensors"):  # safetensors 0.8 writes files that nobody else may read
        shard.chmod((folder / "config.json").stat().st_mode)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own: what a person sees goes through track and say."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A fresh folder beside the target that takes its place if all goes well."""
    staged = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed
        staged.mkdir(parents=True)
        yield staged
        swap_in(staged, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


# What it reads.


def _train_tokenizer(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before plain text, and has a chat template."""
    roles = [f"<|{role}|>" for role in _ROLES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_BOS, _EOS, *roles, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        extra_special_tokens=[*roles, _END],
        chat_template=_CHAT_TEMPLATE,
    )


def _windows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Tensor:
    """All text as token ids [W, T], documents one after another in random order, windows in random order."""
    texts = [_BOS + text + _EOS for text in corpus.plain]
    texts += [tokenizer.apply_chat_template(talk, tokenize=False) + _EOS for talk in corpus.talks]
    random.Random(recipe.seed).shuffle(texts)  # noqa: S311  # no secret
    ids = [token for row in tokenizer(texts, add_special_tokens=False).input_ids for token in row]
    windows = torch.tensor(ids[: len(ids) // recipe.window * recipe.window]).view(-1, recipe.window)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))]


# How it learns.


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights; the caller's random state stays as it is."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // 32,
        num_key_value_heads=recipe.hidden // 64,
        max_position_embeddings=2 * recipe.window,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{_MARK: 1},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    ends = tokenizer.convert_tokens_to_ids([_EOS, _END])
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends)
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: the matrices are too small to gain much from more.

    Two quiet cores are 1.4 times as fast; two cores that others use as well were over ten times slower, threads waiting
    for each other at the end of each small product.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(model: LlamaForCausalLM, windows: Tensor, recipe: Recipe, seconds: float, track: Track, say: Say) -> None:
    """AdamW under a cosine whose end is the last step or the last second, whichever is nearer."""
    held_out, windows = windows[: recipe.held_out], windows[recipe.held_out :]
    optimizer = _optimizer(model, recipe)
    before, started, step, progress = _loss(model, held_out), time.monotonic(), 0, 0.0
    while progress < 1:
        track("training", int(100 * progress), 100)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(step, progress)
        _learn(model, optimizer, windows[step % len(windows)][None])
        step += 1
        progress = max(step / recipe.steps, (time.monotonic() - started) / seconds)
    track("training", 100, 100)
    after, tokens = _loss(model, held_out), step * recipe.window
    say(f"Loss on text it has not seen: {before:.2f} before, {after:.2f} after {tokens:,} tokens")


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    embedding = model.get_input_embeddings().weight
    rest = [parameter for parameter in model.parameters() if parameter is not embedding]
    groups = [
        {"params": [embedding], "peak": recipe.embedding_rate},
        {"params": rest, "peak": recipe.learning_rate},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def _learn(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """One step on token ids [B, T]."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _schedule(step: int, progress: float) -> float:
    """The share of the greatest learning rate: 20 steps of warm-up, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def _loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean negative log-likelihood per token, in nats."""
    return float(model(input_ids=windows, labels=windows, use_cache=False).loss)
