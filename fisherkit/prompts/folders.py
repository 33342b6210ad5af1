"""Folders of data files: which of them are the prompt set."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fisherkit.errors import PromptError
from fisherkit.prompts.compression import split_compression
from fisherkit.prompts.dataset_library import TABLES
from fisherkit.prompts.parsers import PARSERS
from fisherkit.prompts.wording import clipped

_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPLIT = re.compile(rf"(?:^|[._/-])({'|'.join(_SPLITS)})(?=[._/-]|\d|$)", re.IGNORECASE)


def data_files(folder: Path, split: str | None) -> list[Path]:
    """Return a folder's data files in order of their paths, those of one split where their names tell splits.

    Args:
        folder: searched with all folders below it; hidden files, notes and descriptions are left out.
        split: ``train``, ``validation`` or ``test``; None for ``train``, or the only one.

    Raises:
        PromptError: no data file, files of several formats, or no such split.
    """
    found = [path for path in sorted(folder.rglob("*")) if _is_data(path.relative_to(folder)) and path.is_file()]
    texts = [path for path in found if split_compression(path)[0] == ".txt"]
    files = [path for path in found if path not in texts] or texts  # beside tables, text files are notes
    if not files:
        known = ", ".join([*filter(None, PARSERS), *TABLES])
        raise PromptError(f"{folder}: a folder without a prompt file in it; known are {known}")
    kinds = Counter(split_compression(path)[0] for path in files)
    if len(kinds) > 1:
        some = next(iter(kinds))
        raise PromptError(
            f"{folder}: holds {' and '.join(sorted(kinds))} files; name those to read, as in '{folder}/*{some}'"
        )
    return _of_one_split(folder, files, split)


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    notes = path.name in _NOT_DATA or path.name.upper().startswith(("README", "LICENSE"))
    return not hidden and not notes and split_compression(path)[0] in {*PARSERS, *TABLES} - {""}


def _of_one_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if split is None and (len(by_split) == 1 or "train" not in by_split):
        split = next(iter(by_split)) if len(by_split) == 1 else None
    elif split is None:
        split = "train"
    if split is None or _SPLITS.get(split, split) not in by_split:
        raise _no_split(folder, by_split)
    return by_split[_SPLITS.get(split, split)]


def _split_of(path: Path) -> str:
    """Return the split that a path's last name for one tells; empty where it tells none."""
    names = _SPLIT.findall(path.as_posix())
    return _SPLITS[names[-1].lower()] if names else ""


def _no_split(folder: Path, splits: Iterable[str]) -> PromptError:
    names = [split for split in splits if split]
    if not names:
        return PromptError(f"{folder}: its files are of no split; name the folder alone")
    return PromptError(f"{folder}: has the splits {clipped(', '.join(names), 60)}; name one as {folder}:{names[0]}")
