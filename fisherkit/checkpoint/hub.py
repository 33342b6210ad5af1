"""From what the user wrote to a folder on this machine: a local path, or a model of the Hugging Face Hub.

Standard library only at import; huggingface_hub is loaded when a reference is not a local path. Its cache,
token, endpoint and offline mode are its own business.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from fisherkit.errors import CheckpointError

_FILE_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".json"}

# What no command ever opens. A deny list: a list of what is wanted would miss chat templates and tokenizers to come.
_NEVER = (
    *("*.gguf", "*.onnx", "*.onnx_data", "onnx/*", "openvino/*", "*.msgpack", "*.h5", "*.tflite", "*.ot", "coreml/*"),
    *("original/*", "consolidated*", "optimizer*", "scheduler.pt", "rng_state*", "training_args.bin"),
    *("global_step*/*", "events.out.tfevents*", "runs/*"),
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelSource:
    """Place of a model.

    Attributes:
        path: folder or file on this machine.
        id: what the user wrote, without ``@revision``.
        revision: commit of a hub model; None for a local path.
    """

    path: Path
    id: str
    revision: str | None


def resolve_model(reference: str, *, weights: bool = True) -> ModelSource:
    """Find a model, and download it where it is a hub model that is not cached.

    Args:
        reference: an existing path, or ``org/name``, ``org/name@revision``, ``hf://org/name``.
        weights: False leaves the tensors on the hub: configuration and tokenizer only.

    Raises:
        CheckpointError: no such path, no such model or revision, no access, no network.
    """
    local = _existing(reference)
    if local is not None:
        return ModelSource(local, reference, None)
    model, _, revision = reference.removeprefix("hf://").partition("@")
    if not reference.startswith("hf://") and _is_path(model):
        raise CheckpointError(f"{reference}: no such file or directory")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise CheckpointError(f"{reference!r}: neither an existing path nor a model id such as org/name@revision")
    folder = _snapshot(model, revision or None, (*_NEVER, *_PICKLES, *(() if weights else ("*.safetensors",))))
    if weights and not any(folder.glob("*.safetensors")):
        folder = _snapshot(model, revision or None, _NEVER)
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return ModelSource(folder, model, commit)


def find_file(reference: str | Path) -> Path:
    """Return the path of a file or folder; for ``org/name[@revision]`` that does not exist here, the model's folder.

    Args:
        reference: what a user typed; a path that does not exist and is no model id comes back as it is.

    Raises:
        CheckpointError: no such model or revision, no access, no network.
    """
    text = str(reference)
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@.+)?", text) is not None and not _is_path(text.partition("@")[0])
    return resolve_model(text).path if is_id and _existing(text) is None else Path(reference)


def _existing(reference: str) -> Path | None:
    try:
        path = Path(reference).expanduser()
        return path if reference and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, a NUL inside
        return None


def _is_path(text: str) -> bool:
    return (
        text.startswith(("/", ".", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith("/")
        or Path(text).suffix.lower() in _FILE_SUFFIXES
    )


def _snapshot(model: str, revision: str | None, ignore: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, snapshot_download

    # transformers 5.8 and 5.17 bring huggingface_hub 1.x. 1.33, given a commit whose list of files is not cached, asks
    # the network although HF_HUB_OFFLINE is set, and never looks into the cache; 2.x does.
    offline = constants.HF_HUB_OFFLINE
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=list(ignore), local_files_only=offline))
    except Exception as error:  # the hub's own errors, and those of whatever HTTP library it is built on
        partial = getattr(error, "snapshot_path", None)
        if partial is not None:  # offline with part of the repository: often the part that matters; shards are checked
            return Path(partial)
        raise CheckpointError(_reason(model, revision, error)) from None


def _reason(model: str, revision: str | None, error: Exception) -> str:
    """One line for each way in which the hub says no; most specific first, since its errors derive from each other."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"{model}: gated; accept its terms on its page on the Hub, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model}: the Hub has this model, but no revision {revision!r} of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{model}: neither a local path nor a model on the Hub; check the name, or `hf auth login` if it is private"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{model!r}: neither an existing path nor a model id such as org/name@revision"
    if constants.HF_HUB_OFFLINE:
        at = f" at revision {revision!r}" if revision else ""
        return f"{model}: not a local path, and not cached{at}, while HF_HUB_OFFLINE is set; unset it to download"
    first = next(iter(str(error).splitlines()), "")[:160]
    return f"{model}: not a local path, and fetching it failed ({type(error).__name__}: {first}); check the network"
