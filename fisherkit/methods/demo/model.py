"""Demo model: a small real Llama, trained here in about a minute and saved as users have theirs.

Nothing is downloaded: the text is ``corpus``'s, the tokenizer is trained on it too. What extract and inspect make
of the model is none of this module's business; to them it is a checkpoint like any other.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fisherkit.methods.demo.corpus import Corpus, read_corpus
from fisherkit.methods.demo.files import MARK, VERSION, is_reusable, save, written_aside
from fisherkit.methods.demo.held_out import learnt_corpus
from fisherkit.methods.demo.training import Course, Windows, learn, one_thread, windows
from fisherkit.progress import Say, Track

_BOS, _EOS, _END = "<s>", "</s>", "<|end|>"
_ROLES = ("system", "user", "assistant")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Recipe(Course):
    """Size of the demo model, and its course.

    Attributes:
        vocabulary: tokens, special ones included; more than 262.
        hidden: width of the residual stream; a multiple of 64.
        layers: decoder blocks; 12 make two groups of the default size of 8.
    """

    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 12


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
    if is_reusable(target):
        say(f"{target}: made by an earlier run, used again (delete it to train anew)")
        return target
    with written_aside(target) as staged:  # a place that cannot be written shows before the training, not after
        save(*_make(recipe or Recipe(), seconds, track, say), staged)
    say(f"{target}: saved in {len(list(target.glob('*.safetensors')))} shards, with tokenizer and chat template")
    return target


def _make(recipe: Recipe, seconds: float, track: Track, say: Say) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    corpus = read_corpus()
    tokenizer = _train_tokenizer(corpus, recipe.vocabulary)
    text = text_windows(tokenizer, recipe, corpus)
    model = _new_model(recipe, tokenizer)
    say(
        f"Training a Llama of {model.num_parameters() / 1e6:.1f} million weights on Python's documentation and sources "
        f"({text.ids.numel() / 1e6:.1f} million tokens, {seconds:.0f} seconds at most)"
    )
    with one_thread():
        learn(model, text, recipe, seconds, track, say)
    return model, tokenizer


# What it reads.


def _train_tokenizer(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts BOS before plain text, and has a chat template."""
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


def text_windows(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, corpus: Corpus | None = None) -> Windows:
    """Return all text that the model learns, documents in random order; the first windows only tell the loss."""
    corpus = learnt_corpus(corpus or read_corpus())
    texts = [_BOS + text + _EOS for text in corpus.plain]
    texts += [tokenizer.apply_chat_template(turns, tokenize=False) + _EOS for turns in corpus.conversations]
    random.Random(recipe.seed).shuffle(texts)  # noqa: S311  # no secret
    return windows(((ids, True) for ids in tokenizer(texts, add_special_tokens=False).input_ids), recipe)


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make a model of random weights; the caller's random state stays as it is."""
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
        **{MARK: VERSION},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    ends = tokenizer.convert_tokens_to_ids([_EOS, _END])
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends)
    return model
