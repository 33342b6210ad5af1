"""Files around the weights of a model: which of them belong into a model made of two, and from which side.

Config, tokenizer, chat template and the rest come from the tuned side, and from BASE where the tuned side has none.
What is copied is decided by a list of what is not, since a list of what is would miss the file formats to come.
Standard library only; knows nothing of tensors.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fisherkit.checkpoint.headers import file_size, parse_json
from fisherkit.errors import CheckpointError, OutputError

_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot", "*.npz"),
    *("*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.pkl", "*.pickle", "*.distcp"),
)
_NEVER_FILES = (
    *(*_WEIGHTS, "*.index.json", ".*", "*.lock", "*.tmp", "*.incomplete", "*.pyc", "config.json", "README.md"),
    *("adapter_*", "optimizer*", "scheduler*", "rng_state*", "scaler*", "training_args*", "trainer_state.json"),
    *("*_results.json", "events.out.tfevents*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*"),
)
_NEVER_FOLDERS = (
    *(".*", "__pycache__", "checkpoint-*", "global_step*", "runs", "wandb", "logs", "mlruns", "original", "onnx"),
    *("openvino", "coreml", "gguf", "*.mlpackage", "*.partial"),
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*")
_TOKENIZERS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("*.tiktoken", "tekken.json", "sentencepiece*.model"),
)
_TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class SideFile:
    """A file to copy beside the weights.

    Attributes:
        path: where it goes, relative to the output; as it was, relative to its own folder.
        source: the file to copy; may be a link.
    """

    path: Path
    source: Path


@dataclass(frozen=True)
class OutputConfig:
    """Contents of the output's config.json.

    Attributes:
        values: what goes into it; None where neither side has one.
        notes: what was decided on the way, one sentence each.
    """

    values: dict[str, Any] | None
    notes: tuple[str, ...] = ()


def folder_of(checkpoint: Path) -> Path | None:
    """Return a checkpoint's model folder: itself, or the folder around a file; None where that is no model folder.

    A model folder has a config.json, or what a tokenizer or an adapter is known by. Files beside a lone tensor file
    have nothing to do with it.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    known = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
    return folder if any((folder / name).is_file() for name in known) else None


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint, as it is; empty where there is none.

    Raises:
        CheckpointError: it is not a JSON object, or cannot be read.
    """
    folder = folder_of(checkpoint)
    path = folder / "config.json" if folder else None
    return _read_json(path) if path is not None and path.is_file() else {}


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the class names in a config, or its model type where it has none; nothing where neither is text."""
    named, kind = config.get("architectures"), config.get("model_type")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return names or ([kind] if isinstance(kind, str) else [])


def side_files(base: Path, tuned: Path | None, *, from_tuned: bool = True) -> list[SideFile]:
    """List what to copy beside the weights, by path. Never weights, indexes, training state, config or README.

    A tokenizer is taken whole from one side, since files of two do not fit each other. A chat template is taken from
    BASE only if the tuned side has none, in a file or in its tokenizer's config. Python code comes from the side whose
    config is used.

    Args:
        base: folder or file of BASE.
        tuned: folder or file of the tuned model, or of an adapter; None where there is none.
        from_tuned: False takes everything from BASE.

    Raises:
        CheckpointError: a folder or a config that cannot be read.
    """
    ours = _files(base)
    theirs = _files(tuned) if tuned is not None and from_tuned else {}
    if tuned is not None and not _same_model(read_config(base), _own_config(tuned)):
        theirs = {path: source for path, source in theirs.items() if path.suffix != ".py"}
    lost: tuple[str, ...] = _TEMPLATES if _has_template(theirs) else ()
    if any(_matches(path, _TOKENIZERS) for path in theirs):
        lost += _TOKENIZERS
    ours = {path: source for path, source in ours.items() if not _matches(path, lost)}
    return [SideFile(path, source) for path, source in sorted((ours | theirs).items())]


def code_files(files: Sequence[SideFile]) -> tuple[str, ...]:
    """Return the Python files among them: code that runs where the model is loaded with trust_remote_code."""
    return tuple(file.path.as_posix() for file in files if file.path.suffix == ".py")


def copy_side_files(files: Sequence[SideFile], into: Path) -> tuple[str, ...]:
    """Copy what links point to, with the permissions of new files; returns the paths made, relative to ``into``.

    Raises:
        OutputError: one cannot be read or written.
    """
    for file in files:
        target = into / file.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copyfile(file.source, target)
        except OSError as error:
            raise OutputError(f"{target}: cannot be copied from {file.source}: {error.strerror or error}") from None
    return tuple(file.path.as_posix() for file in files)


def output_config(base: Path, tuned: Path | None, *, untied: bool = False) -> OutputConfig:
    """Return the config of a model that has BASE's layout and dtypes.

    The tuned side's where it is the same model (equal model_type and architectures), since a fine-tune may have
    changed settings; otherwise BASE's. Dtypes and the tying of embeddings are BASE's in either case.

    Args:
        base: folder or file of BASE.
        tuned: folder or file of the tuned model or of an adapter; None where there is none.
        untied: the output stores an embedding and a head that may differ (see Pairing.untied).

    Raises:
        CheckpointError: a config.json that is not a JSON object.
    """
    ours, theirs = read_config(base), _own_config(tuned) if tuned is not None else {}
    if not ours and not theirs:
        return OutputConfig(None, ("neither side has a config.json, so the output has none",))
    notes = []
    if theirs and ours and not _same_model(ours, theirs):
        notes.append(f"config.json is BASE's: {_described(theirs)} on the tuned side is not {_described(ours)}")
    chosen = theirs if theirs and (not ours or _same_model(ours, theirs)) else ours
    values = _as_stored(chosen, ours) if ours else dict(chosen)
    if untied:
        _untie(values)
    values.pop("_name_or_path", None)  # a path on somebody's machine
    return OutputConfig(values, tuple(notes))


def _read_json(path: Path) -> dict[str, Any]:
    file_size(path)
    try:
        return parse_json(path, path.read_bytes(), "config")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _own_config(tuned: Path) -> dict[str, Any]:
    """Read the tuned side's config; none for an adapter, whose folder may hold one of whatever was trained."""
    folder = folder_of(tuned)
    return {} if folder is not None and (folder / "adapter_config.json").is_file() else read_config(tuned)


def _same_model(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return all(ours.get(key) == theirs.get(key) for key in ("model_type", "architectures"))


def _described(config: Mapping[str, Any]) -> str:
    return ", ".join(architectures(config)) or "a model without a type"


def _as_stored(chosen: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``chosen`` with BASE's dtype and tying, in its parts too; sorted, as transformers writes configs."""
    values = {key: value for key, value in chosen.items() if key not in ("dtype", "torch_dtype", _TIE)}
    dtype = base.get("dtype", base.get("torch_dtype"))
    if dtype is not None:
        named_by = chosen if chosen.keys() & {"dtype", "torch_dtype"} else base
        values["torch_dtype" if "torch_dtype" in named_by else "dtype"] = dtype
    if _TIE in base:
        values[_TIE] = base[_TIE]
    for name, part in chosen.items():
        if name.endswith("_config") and isinstance(part, Mapping) and isinstance(base.get(name), Mapping):
            values[name] = _as_stored(part, base[name])
    return dict(sorted(values.items()))


def _untie(values: dict[str, Any]) -> None:
    values[_TIE] = False
    text = values.get("text_config")
    if isinstance(text, dict) and text.get(_TIE):
        values["text_config"] = text | {_TIE: False}


def _files(checkpoint: Path) -> dict[Path, Path]:
    folder = folder_of(checkpoint)
    try:
        return {source.relative_to(folder): source for source in _walk(folder)} if folder is not None else {}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from None


def _walk(folder: Path) -> Iterator[Path]:
    """List files to copy. Links to files are followed (the hub's cache is made of them), links to folders are not."""
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and not _named(entry, _NEVER_FILES):
            yield entry
        elif entry.is_dir() and not (entry.is_symlink() or _named(entry, _NEVER_FOLDERS) or _is_model(entry)):
            yield from _walk(entry)


def _is_model(folder: Path) -> bool:
    """Tell if a folder is another checkpoint inside of this one."""
    marks = ("config.json", "adapter_config.json", *_WEIGHTS)
    return any(_named(entry, marks) for entry in folder.iterdir())


def _named(entry: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(entry.name, pattern) for pattern in patterns)


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path.as_posix(), pattern) for pattern in patterns)


def _has_template(files: Mapping[Path, Path]) -> bool:
    """Tell if a side has a chat template, in a file of its own or in the tokenizer's config."""
    config = files.get(Path("tokenizer_config.json"))
    return any(_matches(path, _TEMPLATES) for path in files) or (
        config is not None and bool(_read_json(config).get("chat_template"))
    )
