"""Compressed files opened as streams of bytes, by the codec that their last suffix names."""

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from fisherkit.errors import MissingLibraryError

BROKEN: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Errors that reading from an opened file may raise."""


def split_compression(path: Path) -> tuple[str, str]:
    """``a.jsonl.gz`` -> ``(".jsonl", ".gz")``, ``a.jsonl`` -> ``(".jsonl", "")``; in lower case."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in CODECS else (suffix, "")


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed.

    Raises:
        MissingLibraryError: for ``.zst`` where neither Python nor an installed library has the codec.
        OSError: the file cannot be opened.
    """
    return CODECS.get(path.suffix.lower(), _open_plain)(path)


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_gzip(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(path, "rb"))


def _open_zstd(path: Path) -> IO[bytes]:
    for name in ("compression.zstd", "backports.zstd"):  # Python 3.14, and its backport
        try:
            return io.BufferedReader(importlib.import_module(name).open(path, "rb"))
        except ImportError:
            continue
    try:
        library = importlib.import_module("zstandard")
    except ImportError:
        raise MissingLibraryError("zstandard", f"{path}: a .zst file, which") from None
    return io.BufferedReader(_ZstdFrames(path, library))


class _ZstdFrames(io.RawIOBase):
    """All frames of a file through the library ``zstandard``, whose own reader takes a cut-off file for a whole one."""

    def __init__(self, path: Path, library: Any) -> None:
        self._library = library
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._more():
            pass
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def _more(self) -> bool:
        """Decompress another piece; False at the end."""
        ahead = self._frame is not None and self._frame.eof
        data = (self._frame.unused_data if ahead else b"") or self._file.read(2**16)
        if not data:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the file ends in the middle of a frame")
            return False
        if self._frame is None or ahead:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            self._ready = self._frame.decompress(data)
        except self._library.ZstdError as error:
            raise OSError(str(error)) from None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


CODECS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": _open_gzip,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}
