"""Tokenizers beside a model: broken files are one line each, and a hash tells whether two split text alike."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from prompt_sets import QA, load
from tiny_tokenizers import CHATML, CharTokenizer, tiny_tokenizer

from fisherkit.errors import CheckpointError, PromptError
from fisherkit.prompts.tokenizer import hash_tokenizer, load_tokenizer

BROKEN = {
    "tokenizer.json": [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"model": {"type": "Nope"}}',
        "[" * 5000,
        "\0",
        '{"version": 1e999}',
    ],
    "tokenizer_config.json": ["", "{", "[]", "null", "3", '{"tokenizer_class": 3}', '{"tokenizer_class": "Nope"}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_broken_tokenizer_files_are_one_short_line_or_harmless(tmp_path: Path, name: str, content: str) -> None:
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    message = None
    try:
        ids = load_tokenizer(tmp_path)("hello").input_ids
    except CheckpointError as error:
        message = str(error)
    if message is None:
        assert name == "tokenizer_config.json"  # it only adds to the other file
        assert ids == tiny_tokenizer()("hello").input_ids
    else:
        assert message.startswith(f"{tmp_path}: no tokenizer that transformers can load")
        assert "\n" not in message


def test_a_tokenizer_that_fails_on_text_is_one_line(tmp_path: Path) -> None:
    class Failing(CharTokenizer):
        def _tokenize(self, text: str, **_: Any) -> list[str]:
            raise RuntimeError("no such token")

    with pytest.raises(PromptError, match="the tokenizer fails: no such token"):
        load(tmp_path, [QA], Failing())


def test_the_hash_of_a_tokenizer_is_that_of_its_rules(tmp_path: Path) -> None:
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    assert hash_tokenizer(load_tokenizer(tmp_path)) == hash_tokenizer(load_tokenizer(tmp_path))
    assert hash_tokenizer(CharTokenizer()) != hash_tokenizer(tiny_tokenizer())
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
