"""Options that commands share which run a model on prompts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fisherkit.cli.app import MACHINE
from fisherkit.errors import OptionError
from fisherkit.options import extract as choices
from fisherkit.options import parse_json

PROMPTS = "What is read"

Field = Annotated[
    str | None,
    typer.Option(
        help="Column with the prompt, or prompt=..,context=..,completion=..; found by itself otherwise.",
        rich_help_panel=PROMPTS,
    ),
]
Limit = Annotated[int, typer.Option(help="Use the first so many rows; 0 for all.", rich_help_panel=PROMPTS)]
MaxLength = Annotated[
    int, typer.Option(help="Tokens per sample; longer ones are cut on the right.", rich_help_panel=PROMPTS)
]
ChatTemplate = Annotated[
    choices.ChatTemplate, typer.Option(help="Use the tokenizer's; auto: when it has one.", rich_help_panel=PROMPTS)
]
ChatTemplateKwargs = Annotated[str, typer.Option(help="JSON passed to the template.", rich_help_panel=PROMPTS)]
Loss = Annotated[
    choices.Loss,
    typer.Option(
        help="Tokens that count: all, the answer (completion), all its turns (assistant); auto is completion "
        "where the set has answers, else all.",
        rich_help_panel=PROMPTS,
    ),
]
GroupSize = Annotated[
    int, typer.Option(help="Layers in memory at a time; lowered if they do not fit.", rich_help_panel=MACHINE)
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        help="Padded tokens per batch; never changes the result. 1024 on a CPU, 8192 on other devices.",
        rich_help_panel=MACHINE,
    ),
]
DType = Annotated[
    choices.DType,
    typer.Option(
        help="What is computed in; auto is the checkpoint's own, or float32 on a CPU far faster in that.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, xpu, mps.", rich_help_panel=MACHINE)]
Engine = Annotated[
    choices.Engine,
    typer.Option(help="stream: group by group; resident: the whole model in memory.", rich_help_panel=MACHINE),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that ships with the model.", rich_help_panel="Danger"),
]


def run_options(
    *,
    field: str | None,
    limit: int,
    max_length: int,
    chat_template: choices.ChatTemplate,
    chat_template_kwargs: str = "{}",
    loss: choices.Loss,
    group_size: int,
    batch_tokens: int | None = None,
    dtype: choices.DType,
    device: str,
    engine: choices.Engine = "auto",
    resume: bool,
    trust_remote_code: bool,
    force: bool,
) -> dict[str, Any]:
    """Return what these commands take as keywords of RunOptions, from which their own options derive."""
    return {
        "field": field,
        "limit": limit,
        "max_length": max_length,
        "chat_template": chat_template,
        "chat_template_kwargs": parse_json("chat-template-kwargs", chat_template_kwargs),
        "loss": loss,
        "group_size": group_size,
        "batch_tokens": batch_tokens,
        "dtype": dtype,
        "device": device,
        "engine": engine,
        "resume": resume,
        "trust_remote_code": trust_remote_code,
        "force": force,
    }


def named_prompts(given: Sequence[str]) -> dict[str, list[str]]:
    """Return prompt sets by name: ``["old=a.jsonl", "old=b.jsonl"]`` is ``{"old": ["a.jsonl", "b.jsonl"]}``.

    What comes without a name, ``builtin`` or ``data/a.jsonl``, is called ``builtin`` or ``a``.

    Raises:
        OptionError: a name or a source is empty, a source is given twice, or two without a name would be called alike.
    """
    sets: dict[str, list[str]] = {}
    unnamed: set[str] = set()
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or os.path.exists(text):
            name, source = ("stdin" if text == "-" else Path(text).name.partition(".")[0] or text), text
        if not name.strip() or not source.strip():
            raise OptionError(f"--prompts takes NAME=FILE, such as old=general.jsonl, not {text!r}")
        name, source = name.strip(), source.strip()
        if source in sets.get(name, ()):
            raise OptionError(f"--prompts {source} is given twice, and its samples would count twice; give it once")
        if name in sets and (source == text.strip() or name in unnamed):
            raise OptionError(f"--prompts {text}: another set is called {name!r}; name them, such as old=FILE new=FILE")
        unnamed |= {name} if source == text.strip() else set()
        sets.setdefault(name, []).append(source)
    return sets
