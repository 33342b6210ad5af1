"""Sound files of every format that a command reads, and the commands that are to meet them damaged."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pairs
import tiny
import torch
from forked import run
from safetensors.torch import load_file

INDEX = "model.safetensors.index.json"
Q0, GATE1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"


@dataclass(frozen=True)
class Target:
    """Files of one kind, and what reads them.

    Attributes:
        files: those that may be damaged, by their paths below the material's folder.
        commands: what is run on them, in a folder that holds a copy of the material.
    """

    name: str
    files: tuple[str, ...]
    commands: tuple[str, ...]


SHARD = "base/model-00001-of-00003.safetensors"
TARGETS = (
    Target(
        "index",
        (f"base/{INDEX}",),
        ("inspect base --by tensor", "fapm base tuned out", "extract base p.jsonl -o out.pt"),
    ),
    Target("shard", (SHARD,), ("inspect base --by tensor", "merge base tuned out", "extract base p.jsonl -o out.pt")),
    Target(
        "config",
        ("base/config.json",),
        ("extract base p.jsonl -o out.pt", "extract base --dry-run", "fapm base tuned out"),
    ),
    Target(
        "tokenizer",
        ("base/tokenizer.json", "base/tokenizer_config.json"),
        ("extract base p.jsonl --dry-run", "extract base p.jsonl -o out.pt"),
    ),
    Target(
        "fisher",
        ("fisher.safetensors", "fisher.json"),
        ("inspect fisher.safetensors", "mask fisher.safetensors -o out.safetensors --preset fggm"),
    ),
    Target(
        "part",
        ("part-1.safetensors", "part-1.json"),
        ("combine part-1.safetensors part-2.safetensors -o out.safetensors",),
    ),
    Target("pickled fisher", ("plain.pt",), ("inspect plain.pt", "mask plain.pt -o out.safetensors --preset fish")),
    Target(
        "mask",
        ("mask.safetensors", "mask.json"),
        (
            "inspect mask.safetensors",
            "merge base tuned out --mask mask.safetensors",
            "export mask.safetensors --to axolotl",
        ),
    ),
    Target(
        "subspace",
        ("sub.safetensors", "sub.json"),
        ("inspect sub.safetensors", "merge base tuned out --subspace sub.safetensors"),
    ),
    Target("delta", ("delta.safetensors", "delta.json"), ("merge base delta.safetensors out",)),
    Target(
        "activations",
        ("seen.activations.safetensors", "seen.activations.json"),
        ("mask seen.safetensors -o out.safetensors --basis activation --svd-energy 0.9",),
    ),
    Target(
        "importance",
        ("layer_importance.json",),
        ("inspect layer_importance.json", "merge base tuned out --layer-scale layer_importance.json"),
    ),
    Target(
        "adapter",
        ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        ("fapm base adapter out", "merge base adapter out", "score base adapter --prompts p.jsonl"),
    ),
    Target(
        "prompts", ("p.jsonl", "chat.jsonl"), ("extract base p.jsonl --dry-run", "extract base chat.jsonl --dry-run")
    ),
    Target(
        "scored sets",
        ("q.jsonl", "p.txt"),
        ("score base --prompts q.jsonl --choices choices", "score base --prompts p.txt --window 4"),
    ),
    Target("samples", ("s.jsonl",), ("inspect s.jsonl", "inspect s.jsonl --format table")),
    Target("rows", ("p.csv", "p.txt"), ("extract base p.csv --dry-run", "extract base p.txt --dry-run")),
)


def make_material(folder: Path) -> Path:
    """All the files of TARGETS in one folder."""
    base, _ = pairs.make(folder)
    held = pairs.tensors(base)
    pairs.adapter(folder / "adapter", {name: held[name] for name in (Q0, GATE1)})
    _write_prompts(folder)
    made = (
        "extract base p.jsonl -o fisher.safetensors",
        "extract base p.jsonl -o seen.safetensors --statistics activations",
        "extract base p.jsonl -o part-1.safetensors --shard 1/2",
        "extract base p.jsonl -o part-2.safetensors --shard 2/2",
        "mask fisher.safetensors -o mask.safetensors --preset fggm",
        "mask fisher.safetensors -o sub.safetensors --svd-rank 2",
        "fapm base tuned --sparse delta.safetensors",
        "score base tuned --prompts p.jsonl --samples s.jsonl",
    )
    for command in made:
        done = run(command.split(), folder)
        assert done.code == 0, done.stderr
    torch.save(load_file(folder / "fisher.safetensors"), folder / "plain.pt")
    return folder


def _write_prompts(folder: Path) -> None:
    tiny.write_prompts(folder / "p.jsonl")
    turns = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Po."}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3)
    asked = {"question": "Which is a river?", "choices": ["Po", "Rome", "Etna"], "answer": 0}
    (folder / "q.jsonl").write_text((json.dumps(asked) + "\n") * 3)
    (folder / "p.csv").write_text("prompt,completion\nName a river.,The Po.\nTwo and two?,Four\n")
    (folder / "p.txt").write_text("Name a river.\nYes.\n")


def copy_material(material: Path, place: Path, damaged: set[str]) -> None:
    """Lay the material out anew: links to what stays sound, copies of what is to be damaged."""
    for path in material.rglob("*"):
        name = path.relative_to(material)
        if path.is_dir():
            (place / name).mkdir(parents=True, exist_ok=True)
        elif name.as_posix() in damaged:
            shutil.copyfile(path, place / name)
        else:
            (place / name).hardlink_to(path)
