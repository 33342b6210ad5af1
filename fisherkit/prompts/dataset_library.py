"""Rows through the optional library ``datasets``: parquet and arrow files, saved data sets, and the hub."""

import glob
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fisherkit.errors import MissingLibraryError, PromptError, first_line
from fisherkit.prompts.turns import Row
from fisherkit.prompts.wording import clipped

TABLES = (".parquet", ".arrow")
"""Suffixes of files that only this library reads."""


def table_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a parquet or arrow file."""
    kind = path.suffix.lower().removeprefix(".")

    def load(datasets: Any) -> Any:
        # Data files are patterns to datasets; streaming spares a copy in its cache.
        return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)

    return _rows(str(path), f"a {kind} file" if kind == "parquet" else "an arrow file", load)


def saved_rows(folder: Path, split: str | None) -> Iterator[Row]:
    """Read the rows of a folder that ``save_to_disk`` wrote: of the split named, ``train``, or the only one."""

    def load(datasets: Any) -> Any:
        return _one_split(datasets.load_from_disk(str(folder)), str(folder), split)

    return _rows(str(folder), "a saved data set", load)


def hub_rows(source: str, name: str, split: str | None, revision: str | None) -> Iterator[Row]:
    """Read the rows of a data set of the hub: of the split named, ``train``, or the only one."""

    def load(datasets: Any) -> Any:
        # Streaming fetches no more than the rows that are read, but does not know the cache.
        online = not datasets.config.HF_HUB_OFFLINE
        found = datasets.load_dataset(name, split=split, revision=revision, streaming=online)
        return found if split is not None else _one_split(found, name, None)

    return _rows(source, "no file here, so a data set of the hub", load)


def is_saved(folder: Path) -> bool:
    """True for a folder that ``save_to_disk`` wrote."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _one_split(found: Any, name: str, split: str | None) -> Any:
    """Choose a split of a mapping of splits; a data set that is none is returned as it is."""
    if not isinstance(found, dict):
        return found
    wanted = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if wanted not in found:
        splits = clipped(", ".join(found), 100)
        raise PromptError(f"{name}: has the splits {splits}; name one as {name}:{next(iter(found))}")
    return found[wanted]


def _rows(source: str, kind: str, load: Callable[[Any], Iterable[Row]]) -> Iterator[Row]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MissingLibraryError("datasets", f"{source}: {kind}, which") from None
    try:
        yield from map(dict, load(datasets))
    except PromptError:
        raise
    except Exception as error:  # datasets passes on what its storage, network and parsers raise
        raise PromptError(f"{source}: {kind} that cannot be read: {clipped(first_line(error), 160)}") from error
