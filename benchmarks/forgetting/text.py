"""Text that every Python has, and a chat with it: the tokenizer of one token per byte, and how items become tokens.

Knows no model and no task.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, END = "<|pad|>", "<|begin|>", "<|end|>"
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_QUESTION, _ANSWER = "QQQQ", "AAAA"

Tokens = tuple[list[int], int]
"""Token ids, and how many of them, from the first, are only read: no loss is taken for them."""


def corpus(most_bytes: int) -> str:
    """Return the documentation's topics, then modules of the standard library by name, so many bytes at most."""
    parts, room = [], most_bytes
    for part in _documents():
        parts.append(part[:room])
        room -= len(part)
        if room <= 0:
            break
    return "\n".join(parts)


def _documents() -> Iterator[str]:
    yield from (topics.topics[topic] for topic in sorted(topics.topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, one per role, and a chat template."""
    special = [PAD, BOS, END, "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=END, additional_special_tokens=special[3:]
    )
    wrapped.chat_template = _TEMPLATE
    return wrapped


@dataclass(frozen=True)
class Chat:
    """Parts that a chat template puts before a question, between it and its answer, and after that."""

    tokenizer: Any
    before: str
    between: str
    after: str

    @classmethod
    def of(cls, tokenizer: Any) -> "Chat":
        """Read off the tokenizer's own template; plain lines where it has none."""
        if not tokenizer.chat_template:
            return cls(tokenizer, tokenizer.bos_token or "", "\n", tokenizer.eos_token)
        conversation = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        asked = tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(conversation, tokenize=False)
        before, between = asked.split(_QUESTION)
        return cls(tokenizer, before, between, whole.split(_ANSWER)[1].rstrip() or tokenizer.eos_token)

    def tokens(self, items: Sequence[tuple[str, str]]) -> list[Tokens]:
        """Tokenise questions with their answers, each apart, as when the answer is generated."""
        asked = self._ids([f"{self.before}{question}{self.between}" for question, _ in items])
        answers = self._ids([f"{answer}{self.after}" for _, answer in items])
        return [(question + answer, len(question)) for question, answer in zip(asked, answers, strict=True)]

    def text(self, item: tuple[str, str]) -> str:
        """Write a question with its answer as the model reads it."""
        question, answer = item
        return f"{self.before}{question}{self.between}{answer}{self.after}"

    def windows(self, text: str, size: int) -> list[Tokens]:
        """Plain text in pieces of ``size`` tokens; all but the first token of each count."""
        (ids,) = self._ids([text])
        return [(ids[start : start + size], 1) for start in range(0, len(ids) - size + 1, size)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return found
