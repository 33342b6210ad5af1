"""Mask files of every layout, small and made by hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fisherkit.artefacts.mask_file import MaskEntry, entry, header, pack

ROWS, COLUMNS, EXPERTS, VECTOR, PACKED, ODD = "rows", "columns", "experts", "vector", "packed", "odd"


LAYOUT: Mapping[str, tuple[tuple[int, ...], int | None, bool]] = {
    ROWS: ((6, 5), 1, False),
    COLUMNS: ((6, 5), 0, False),
    EXPERTS: ((3, 4, 5), 2, False),
    VECTOR: ((7,), None, False),
    PACKED: ((6, 5), None, True),
    ODD: ((3, 3, 3), None, True),
}


def flags_of(name: str) -> np.ndarray:
    shape, over, packed = LAYOUT[name]
    generator = np.random.default_rng(len(name))
    return generator.random(MaskEntry(shape, over, packed).flags_shape) < 0.4


def write_mask(path: Path, names: tuple[str, ...] = tuple(LAYOUT)) -> Path:
    flags = {name: flags_of(name) for name in names}
    entries = {n: entry(f, LAYOUT[n][0], over=LAYOUT[n][1], packed=LAYOUT[n][2]) for n, f in flags.items()}
    save_file({n: pack(f) if entries[n].packed else f for n, f in flags.items()}, path)
    made = header("mask", path.name, entries, direction="train", options={"keep": 0.4}, fisher={"model": {"id": "m"}})
    path.with_suffix(".json").write_text(json.dumps(made))
    return path


def write_subspace(path: Path, *, shape: tuple[int, ...] = (6, 5), rank: int = 2, sides: str = "USV") -> Path:
    generator = np.random.default_rng(0)
    u, s, v = np.linalg.svd(generator.standard_normal(shape), full_matrices=False)
    parts = {"U": u[..., :rank], "S": s[..., :rank], "V": np.swapaxes(v, -1, -2)[..., :rank]}
    tensors = {f"w.{side}": np.ascontiguousarray(parts[side], np.float32) for side in sides}
    save_file(tensors, path)
    made = header("subspace", path.name, {"w": MaskEntry(shape)}, direction="protect")
    path.with_suffix(".json").write_text(json.dumps(made))
    return path


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    beside = path.with_suffix(".json")
    made = json.loads(beside.read_text())
    change(made)
    beside.write_text(json.dumps(made))
