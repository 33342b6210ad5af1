"""Hash that tells the content of one tensor file from that of another; it reads little, and needs no torch.

JSON files carry it, so that a description is believed for the very file that it was written for.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fisherkit.checkpoint.index import open_index, sample_windows
from fisherkit.checkpoint.layout import data_offset
from fisherkit.errors import CheckpointError

_WHOLE_BYTES = 100 << 20
"""Records of a zip that are no storage (the pickle with names and shapes) are hashed whole up to here."""


def content_sha256(path: Path) -> str:
    """Return a SHA-256, in hex, over names, types, shapes and at most 4 kB of the bytes of each tensor.

    Another file of the same layout (another Fisher of the same model) has another one. A changed byte between the
    sampled ones goes unseen.

    Args:
        path: a ``.safetensors`` file, a folder of shards, or a file that torch.save wrote.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    if path.is_dir() or path.suffix.lower() == ".safetensors":
        return open_index(path).fingerprint()
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for name, start, nbytes in _records(path, file.fileno()):
                digest.update(f"{name}:{nbytes};".encode())
                for first, stop in sample_windows(nbytes) if "data/" in name or not name else [(0, nbytes)]:
                    digest.update(os.pread(file.fileno(), min(stop - first, _WHOLE_BYTES), start + first))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _records(path: Path, descriptor: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and length of every record of a zip; a file in torch's old format is one without name.

    torch.save puts all records under a folder that is called like the file: it is left out, so that a file may be
    renamed.
    """
    if os.pread(descriptor, 4, 0) != b"PK\x03\x04":
        yield "", 0, os.fstat(descriptor).st_size
        return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        for record in records:
            name = record.filename.partition("/")[2] or record.filename
            if name != ".data/serialization_id":  # a number of its own for every save
                yield name, data_offset(descriptor, record), record.compress_size
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: damaged: {error}; fetch it again") from None
