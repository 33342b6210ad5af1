"""A small base and what was fine-tuned from it, on disk as users have them; and the command line run on such pairs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import fork_server
import pytest
import safetensors.torch
import tiny
import torch
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from fisherkit.cli import app

Edit = Callable[[Tensor], Tensor]
Pair = tuple[Path, Path]
Done = subprocess.CompletedProcess[str]
ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"

# Runs the command line in a process of its own after a few lines of Python: a limit, a kill at some point.
_AFTER = "import sys; sys.argv[0] = 'fisherkit'\n{}\nfrom fisherkit.__main__ import main\nmain()"


def make(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Pair:
    """A small model of real layout in several shards, and a fine-tune of it."""
    base = tiny.save(architecture, folder / "base", dtype=dtype)
    return base, fine_tune(base, folder / "tuned")


def make_level(folder: Path) -> Pair:
    """A pair with ties everywhere: ones, of which most became twos; head and embedding are tied and stored twice."""
    drawing = torch.Generator().manual_seed(2)
    ones = changed(make(folder)[0], folder / "ones", lambda _, tensor: torch.ones_like(tensor))
    config = json.loads((ones / "config.json").read_text())
    (ones / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    moved = {
        name: 1 + (torch.rand(tensor.shape, generator=drawing) < 0.7).to(tensor.dtype)
        for name, tensor in tensors(ones).items()
    }
    moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
    return ones, changed(ones, folder / "twos", lambda name, _: moved[name])


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a folder or a file."""
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def fine_tune(base: Path, folder: Path, *, size: float = 0.01, share: float = 0.7, seed: int = 1) -> Path:
    """Move ``share`` of the entries of every floating tensor by noise; everything else as in the base."""
    drawing = torch.Generator().manual_seed(seed)

    def moved(_: str, tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=drawing) * size
        moves = torch.rand(tensor.shape, generator=drawing) < share
        return (tensor.float() + noise * moves).to(tensor.dtype) if tensor.is_floating_point() else tensor

    return changed(base, folder, moved)


def changed(source: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of a checkpoint's folder, of the same shards, with other values."""
    shutil.copytree(source, folder)
    for shard in sorted(folder.glob("*.safetensors")):
        held = {name: change(name, tensor) for name, tensor in safetensors.torch.load_file(shard).items()}
        safetensors.torch.save_file(held, shard, metadata={"format": "pt"})
    return folder


def edit(folder: Path, name: str, change: Edit) -> None:
    """Replace one tensor of a checkpoint in place."""
    for shard in folder.glob("*.safetensors"):
        held = safetensors.torch.load_file(shard)
        if name in held:
            held[name] = change(held[name]).contiguous()
            safetensors.torch.save_file(held, shard, metadata={"format": "pt"})
            return
    raise KeyError(name)


def put(tensor: Tensor, value: float, *places: int) -> Tensor:
    """The tensor with ``value`` at flat places."""
    flat = tensor.clone().reshape(-1)
    flat[list(places)] = value
    return flat.reshape(tensor.shape)


def one_file(folder: Path, target: Path) -> Path:
    """All tensors of a checkpoint in one file, without anything around it."""
    safetensors.torch.save_file(tensors(folder), target, metadata={"format": "pt"})
    return target


def adapter(folder: Path, weights: Mapping[str, Tensor], *, rank: int = 2, **config: Any) -> Path:
    """A LoRA adapter of given rank on each of these weights of a base, as peft saves it."""
    drawing = torch.Generator().manual_seed(5)
    held: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        held[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=drawing) * 0.1
        held[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=drawing) * 0.1
    folder.mkdir()
    safetensors.torch.save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in weights})
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    settings = known | {"target_modules": modules, "base_model_name_or_path": None} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one type and bit-identical, NaN and signed zeros included."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[one.element_size()]
    return one.dtype == other.dtype and bool(torch.equal(one.view(kind), other.view(kind)))


def same_checkpoint(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours)


def is_whole(folder: Path) -> bool:
    """Whether the weights of an output can be read: each tensor that the index, or the file, promises."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).is_file() else None
    for shard in set(weight_map.values()) if weight_map else {"model.safetensors"}:
        with safe_open(folder / shard, "pt") as opened:
            held = {name for name in opened.keys() if opened.get_tensor(name) is not None}  # noqa: SIM118
        if weight_map and held != {name for name, file in weight_map.items() if file == shard}:
            return False
    return True


# The command line


def fisherkit(
    *arguments: object,
    first: str = "",
    stdin: str | None = None,
    cwd: Path | None = None,
    fresh: bool = False,
    **environment: str,
) -> Done:
    """Run a command in a process of its own, after the lines ``first``; what it prints is kept apart."""
    words = ["-c", _AFTER.format(first)] if first else ["-m", "fisherkit"]
    env = {"COLUMNS": "120", **environment}
    return fork_server.run([*words, *map(str, arguments)], stdin=stdin, cwd=cwd, env=env, fresh=fresh)


def cli(*arguments: object) -> Done:
    """Run a command in this process, which is faster; warnings are errors here."""
    words = [str(argument) for argument in arguments]
    with mock.patch.object(sys, "argv", ["fisherkit", *words]):
        done = CliRunner().invoke(app, words, prog_name="fisherkit")
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def cli_in(folder: Path, *words: object) -> Done:
    """Run a command in this process with another working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return cli(*words)


def worked(done: Done) -> str:
    """What a command that must not fail printed on stdout."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def one_line(done: Done, code: int = 1) -> str:
    """The error of a failed command, after checking its form: one line on stderr, nothing on stdout, the code."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.rstrip().endswith(errors[0])  # nothing follows it
    assert "unexpected" not in errors[0], errors[0]
    return errors[0]
