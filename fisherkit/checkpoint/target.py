"""Targets of an output: possible names, and what may be replaced."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fisherkit.errors import OutputError

MANIFEST = "fisherkit.json"
"""Beside a model that fapm or merge wrote: how it was made, and under ``files`` what belongs to it."""


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that could not be made in the end; called before hours of work.

    An empty folder is as good as none. With ``force`` a file may be replaced, and a folder that holds
    nothing but an earlier output: shards, their index, its sidecars and a README, or what its MANIFEST lists.

    Raises:
        OutputError: unknown suffix, parent missing or not writable, or something is there that must not be replaced.
    """
    as_folder = is_folder(target)
    parent = target.parent
    if target.name in ("", ".."):
        raise OutputError(f"{target}: not a name for an output; add one")
    if not parent.is_dir():
        raise OutputError(f"{target}: there is no folder {parent}; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the folder {parent} cannot be written")
    if not os.path.lexists(target) or (as_folder and target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise OutputError(f"{target}: exists already; choose another name, or --force to replace it")
    if as_folder != target.is_dir() or not (target.is_dir() or target.is_file() or target.is_symlink()):
        wanted = "a folder" if as_folder else "a file"
        raise OutputError(
            f"{target}: what is there is not {wanted}, so --force does not replace it; choose another name"
        )
    if as_folder and (foreign := _foreign_file(target)):
        raise OutputError(f"{target}: holds {foreign!r}, so --force does not replace this folder; choose another name")


def check_file(target: Path, *, force: bool) -> None:
    """Refuse a file that is there already, unless it may be replaced, or whose folder is not there.

    Raises:
        OutputError: see above.
    """
    if target.is_dir() or (os.path.lexists(target) and not force):
        raise OutputError(f"{target}: exists already; choose another name or add --force")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target}: there is no folder {target.parent}; make it first")


def is_folder(target: Path) -> bool:
    """Return True if a target is a folder, by its suffix: letters name a format (or are a typo), digits a version.

    Raises:
        OutputError: a suffix such as ``.bin`` or ``.safetensor``.
    """
    suffix = target.suffix.lower()
    if suffix in (".pt", ".safetensors"):
        return False
    if re.fullmatch(r"\.[a-z]+", suffix):
        raise OutputError(f"{target}: unknown suffix {target.suffix!r}; use .pt, .safetensors, or none for a folder")
    return True


def _foreign_file(folder: Path) -> str | None:
    """Return the first entry of a folder that is not part of an output of ours."""
    listed = _manifest(folder)
    if listed is not None:
        found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
        return next((name for name in found if name not in listed), None)
    ending = ".safetensors.index.json"
    stems = [re.escape(entry.name.removesuffix(ending)) for entry in folder.iterdir() if entry.name.endswith(ending)]
    ours = "|".join(
        rf"{stem}(-\d{{5}}-of-\d{{5}}\.safetensors|\.safetensors\.index\.json|\.json|\.activations\.(safetensors|json))"
        for stem in stems[:1]
    )
    known = re.compile(rf"{ours}|layer_importance\.json|README\.md" if ours else r"(?!)")
    names = sorted(entry.name for entry in folder.iterdir())
    return next((n for n in names if not known.fullmatch(n) or not (folder / n).is_file()), None)


def check_apart(written: Sequence[Path], inputs: Sequence[Path], out: Path | None) -> None:
    """Refuse files beside an output that would replace a part of an input, each other, or lie in the output's place.

    Args:
        written: the files.
        inputs: folders and files that are read; those that don't exist are passed over.
        out: the output; None where there is none.

    Raises:
        OutputError: see above.
    """
    seen: set[Path] = set()
    for path in written:
        real = path.resolve()
        if real in seen:
            raise OutputError(f"{path}: would be written twice; give each output a name of its own")
        seen.add(real)
        if any(real == i or (i in real.parents and real.exists()) for i in (path.resolve() for path in inputs)):
            raise OutputError(f"{path}: belongs to an input; choose another name")
        if out is not None and out.resolve() in (real, *real.parents):
            raise OutputError(f"{path}: lies in {out}, which is renamed into place as a whole; put it beside it")


def check_separate(written: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuse files of which one is an input, lies inside of an input's folder, or holds an input.

    Args:
        written: files and folders that would be made; links are followed.
        inputs: files and folders that are read; links are followed.

    Raises:
        OutputError: see above.
    """
    read = [path.resolve() for path in inputs]
    for path in written:
        real = path.resolve()
        for one in read:
            if real == one or one in real.parents or real in one.parents:
                raise OutputError(f"{path}: is an input of this run, lies inside of one, or holds one; write elsewhere")


def _manifest(folder: Path) -> set[str] | None:
    """Return the files of a whole model that fapm or merge wrote here; None if they did not."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        return {MANIFEST, *map(str, content["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
