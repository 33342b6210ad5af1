"""A tokenizer loaded from beside its model, and a hash of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fisherkit.errors import CheckpointError, first_line
from fisherkit.prompts.wording import clipped


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint's folder.

    Args:
        folder: as ``save_pretrained`` writes it.
        trust_remote_code: run Python code that ships with it.

    Raises:
        CheckpointError: there is none, or its files are broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # Rust code raises a bare Exception, and what it did not foresee as a BaseException
        raise CheckpointError(
            f"{folder}: no tokenizer that transformers can load ({clipped(first_line(error), 120)}); "
            "save it beside the model with tokenizer.save_pretrained(FOLDER)"
        ) from error


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash all that decides how a tokenizer splits text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()
