"""Files that appear whole or not at all: written aside, synced, then renamed. No other module renames into place.

An output of several files lies finished in a staging folder first. ``publish`` renames them in an order that ends with
the file that decides, so that a run killed in between leaves nothing that a reader takes for the whole, and calling it
again goes on. What a full or failing disk answers becomes one line here.
"""

import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fisherkit.errors import OutputError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError into one line that names the file and says what to do.

    Args:
        path: the file that is written.
        needed: bytes that the whole output takes, where that is known.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            size = f": {size_text(needed)} needed" if needed is not None else ""
            raise OutputError(
                f"disk full while writing {path}{size}; free space and run again, with --resume if a .partial folder "
                "was left"
            ) from None
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` in one step; a failed write leaves what was there.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    with disk_errors(path):
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        for left in _leftovers(path, f".{path.name}.", ".new"):
            left.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by a text in UTF-8, as write_bytes does; halves of surrogate pairs are spelt out, as in JSON."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` by a JSON object, made in memory before anything is written; see json_text.

    Raises:
        OutputError: the disk is full or cannot be written, or the content is no JSON.
    """
    write_text(path, json_text(path, content))


def json_text(path: Path, content: Mapping[str, Any]) -> str:
    """Return the JSON of ``content``, one space per level.

    Args:
        path: where it will be written; named in the error.
        content: strings, finite numbers, booleans, None, lists and mappings of these.

    Raises:
        OutputError: a number is NaN or infinite, or a value is of another kind; JSON has no word for either.
    """
    try:
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        where = _not_json(content) or str(error)
        raise OutputError(f"{path}: cannot be written: {where}, which JSON cannot hold") from None


def publish(files: Sequence[tuple[Path, Path]]) -> None:
    """Rename the finished files of one output to their places, in the given order.

    A staged file that is gone was renamed by a run that was killed: calling again goes on. The last one decides: put
    the file last that readers open, so that it is never there without what describes it.

    Args:
        files: each file or folder as it is staged, and the path to make or replace, on the same file system.

    Raises:
        OutputError: the system refuses.
    """
    for staged, target in files:
        with disk_errors(target):
            if os.path.lexists(staged):
                swap_in(staged, target)
            else:
                _drop_replaced(target)  # which the killed run had not come to


def swap_in(staged: Path, target: Path) -> None:
    """Rename ``staged`` to ``target`` and make that last through a crash.

    A full folder at the target steps aside first, and comes back if the new one cannot be put there. What stepped aside
    in a run that was killed before it could drop it, is dropped now.

    Raises:
        OSError: the system refuses.
    """
    if target.is_dir() and (target.is_symlink() or any(target.iterdir())):
        aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        target.rename(aside)
        try:
            staged.rename(target)
        except OSError:
            aside.rename(target)
            raise
    else:
        staged.replace(target)
    _drop_replaced(target)
    _sync_folder(target.parent)


def _drop_replaced(target: Path) -> None:
    """Remove what stepped aside for a target."""
    for left in _leftovers(target, f".{target.name}.replaced-", ""):
        left.unlink() if left.is_symlink() else shutil.rmtree(left)


def size_text(nbytes: float) -> str:
    """Return a number of bytes as a person reads it, such as ``97.7 kB``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:  # which three digits would round to 1000
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.0f} PB"


def _leftovers(path: Path, start: str, end: str) -> list[Path]:
    """Return what killed processes left beside ``path``: names of ``start``, a process number, ``end``."""
    return list(path.parent.glob(f"{glob.escape(start)}[0-9]*{glob.escape(end)}"))


def _sync_folder(folder: Path) -> None:
    """Return when the names in ``folder`` are on the disk; a rename alone may be lost by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_json(content: Any, where: str = "") -> str:
    """Return the place and the value that JSON cannot hold; empty where none is found."""
    if isinstance(content, Mapping):
        parts = [(f"{where}.{key}".lstrip("."), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        parts = [(f"{where}[{number}]", value) for number, value in enumerate(content)]
    else:
        try:
            json.dumps(content, allow_nan=False)
        except (TypeError, ValueError):
            return f"{where} is {str(content)[:60]}"
        return ""
    return next((found for place, value in parts if (found := _not_json(value, place))), "")
