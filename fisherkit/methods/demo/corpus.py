"""Text for the demo model that every Python has: its documentation's topics and the sources of its library.

Conversations are lists of turns ``{"role": ..., "content": ...}``, as chat templates take them. Order and content
depend on the Python alone. No tensors.
"""

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

Conversation = list[dict[str, str]]

_LONGEST = 900  # characters of an answer: question and answer fit one window of 256 tokens
_LARGEST = 60_000  # bytes of a module: dozens of modules say more than the five largest


@dataclass(frozen=True)
class Corpus:
    """Text that the demo model reads: conversations for the chat template, and plain texts."""

    conversations: tuple[Conversation, ...]
    plain: tuple[str, ...]

    def texts(self) -> Iterator[str]:
        """Yield all that is said, without roles: what a tokenizer learns from."""
        yield from self.plain
        yield from (turn["content"] for conversation in self.conversations for turn in conversation)


def read_corpus(most_bytes: int = 2_000_000) -> Corpus:
    """Read the documentation topics as conversations, then modules: every fourth as text, the others by function.

    Modules are read in alphabetical order until ``most_bytes`` of source are together.
    """
    conversations, plain = list(_topics()), []
    for number, (module, source) in enumerate(_modules(most_bytes)):
        if number % 4 == 0:
            plain.append(source)
        else:
            conversations.extend(_documented_functions(module, source))
    return Corpus(tuple(conversations), tuple(plain))


def _topics() -> Iterator[Conversation]:
    for topic in sorted(topics.topics):
        asked = f"What does Python's documentation say about {topic}?"
        for part in _parts(topics.topics[topic]):
            yield _exchange(asked, part)
            asked = f"Tell me more about {topic}."


def _parts(text: str) -> Iterator[str]:
    """Yield paragraphs, put together as long as they fit an answer."""
    part = ""
    for paragraph in text.strip().split("\n\n"):
        if part and len(part) + len(paragraph) > _LONGEST:
            yield part
            part = ""
        part = f"{part}\n\n{paragraph}" if part else paragraph
    if part:
        yield part


def _modules(most_bytes: int) -> Iterator[tuple[str, str]]:
    """Yield names and sources of public modules of the standard library, packages (and so its tests) left out."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        size = path.stat().st_size
        if size > _LARGEST:
            continue
        if size > most_bytes:
            return
        most_bytes -= size
        yield path.stem, path.read_text(encoding="utf-8", errors="replace")


def _documented_functions(module: str, source: str) -> Iterator[Conversation]:
    """Yield what each documented function of a module does, and its source when that is short."""
    lines = source.splitlines()
    for name, node in _functions(ast.parse(source), module):
        described, code = ast.get_docstring(node), "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if not described:
            continue
        conversation = _exchange(f"What does {name} do?", described[:_LONGEST])
        if len(code) <= _LONGEST:
            conversation += _exchange(f"Show me the source of {name}.", code)
        yield conversation


def _functions(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield functions and methods with their full names, in the order of the source."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}.{node.name}")


def _exchange(asked: str, answer: str) -> Conversation:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
