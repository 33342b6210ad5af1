"""Checkpoints to be scored: whole ones, adapters and sparse deltas on a base, and those that nobody wrote."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from fisherkit.artefacts.sparse_delta import is_sparse_delta
from fisherkit.checkpoint.computed_reader import ComputedReader
from fisherkit.checkpoint.hub import ModelSource, resolve_model
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.lora.adapter import is_adapter
from fisherkit.checkpoint.lora.config import AdapterConfig
from fisherkit.checkpoint.tensor_source import TensorSource
from fisherkit.checkpoint.torch_reader import Reader
from fisherkit.engine.model.config import config_folder
from fisherkit.errors import OptionError
from fisherkit.pairs.virtual import open_tuned
from fisherkit.progress import Say


@dataclass(frozen=True)
class Candidate:
    """One checkpoint.

    Attributes:
        name: of its row in the table.
        source: where config.json and tokenizer are.
        tensors: gives its weights; whoever opened it closes it.
        part: the adapter or sparse delta that is put on these; None where there is none.
    """

    name: str
    source: ModelSource
    tensors: TensorSource
    part: ModelSource | None = None


@contextmanager
def open_candidates(
    models: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] | None, say: Say
) -> Iterator[list[Candidate]]:
    """Open checkpoints in the order given.

    Args:
        models: checkpoints, PEFT adapters, or files that ``fapm --sparse`` wrote.
        base: what adapters and sparse deltas are put on; None for the first whole checkpoint among the models, else
            for what the adapter itself names.
        say: gets remarks on adapters.

    Raises:
        OptionError: none, one twice, or no base where one is needed.
        CheckpointError: one cannot be read, or does not belong to the base.
    """
    names = [os.fspath(model) for model in models]
    if not names:
        raise OptionError("no MODEL to score")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"{twice} is given twice; each MODEL is scored once")
    sources = {name: resolve_model(name) for name in names}
    parts = {name for name in names if _is_part(sources[name])}
    whole = next((name for name in names if name not in parts), None)
    with ExitStack() as stack:
        opened = []
        for name in names:
            if name in parts:
                on = _base_of(sources[name], os.fspath(base) if base is not None else whole)
                opened.append(_on_base(name, on, stack, say))
            else:
                config_folder(sources[name].path)
                reader = stack.enter_context(Reader(open_index(sources[name].path)))
                opened.append(Candidate(name, sources[name], reader))
        yield opened


def _is_part(source: ModelSource) -> bool:
    return is_adapter(source.path) or is_sparse_delta(source.path)


def _base_of(part: ModelSource, base: str | None) -> str:
    own = AdapterConfig.read(part.path).base_model if base is None and is_adapter(part.path) else base
    if own is None:
        raise OptionError(f"{part.id}: is no whole checkpoint; name the model that it was made for with --base")
    return own


def _on_base(name: str, base: str, stack: ExitStack, say: Say) -> Candidate:
    merged = stack.enter_context(open_tuned(base, name))
    for note in merged.pair.tuned.notes:
        say(f"{name}: {note}")
    return Candidate(name, merged.pair.base_source, ComputedReader(merged), merged.pair.tuned_source)
