"""Masks the obvious slow way, in float64 and by sorting; and small Fishers to make them from."""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fisherkit import MaskOptions, mask
from fisherkit.artefacts.mask_file import open_mask

Doubles = NDArray[np.float64]
Arrays = Mapping[str, NDArray[np.float32]]


def fisher_arrays(layers: int = 3, *, seed: int = 0, rounded: bool = True) -> dict[str, NDArray[np.float32]]:
    """Rows and columns of different sizes, entries that repeat (``rounded``), a vector, a head."""
    generator = np.random.default_rng(seed)
    shapes = {"self_attn.q_proj.weight": (12, 7), "mlp.down_proj.weight": (7, 30), "input_layernorm.weight": (7,)}
    names = {f"model.layers.{n}.{kind}": shape for n in range(layers) for kind, shape in shapes.items()}
    arrays = {}
    for place, (name, shape) in enumerate((names | {"lm_head.weight": (11, 7)}).items()):
        values = generator.standard_normal(shape) ** 4 * 1e-6 * (1 + place)
        arrays[name] = (np.round(values * 1e6) * 1e-6 if rounded else values).astype(np.float32)
    return arrays


def write(path: Path, arrays: Arrays, *, architecture: str = "") -> Path:
    """A Fisher or a checkpoint at ``path``; with an architecture, as extract describes it."""
    save_file(dict(arrays), path, metadata={"format": "pt"})
    if architecture:
        figures = {
            name: {"shape": list(a.shape), "sum": float(a.sum()), "max": 1.0, "zeros": 0, "nonfinite": 0}
            for name, a in arrays.items()
        }
        made = {"format": "fisherkit.fisher/1", "file": path.name, "file_bytes": path.stat().st_size}
        model = {"id": "org/tiny", "architecture": architecture}
        path.with_suffix(".json").write_text(json.dumps(made | {"model": model, "tensors": figures, "histogram": []}))
    return path


def model_order(names: Sequence[str]) -> list[str]:
    """Layer by layer, by name within, what lies outside last."""
    return sorted(names, key=lambda name: (".layers." not in name, name))


def groups(names: Sequence[str], scope: str) -> list[list[str]]:
    """The tensors that share a quota."""
    found: dict[str, list[str]] = {}
    for name in model_order(names):
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else name
        found.setdefault({"tensor": name, "layer": layer, "global": ""}[scope], []).append(name)
    return list(found.values())


def top(scores: Mapping[str, Doubles], keep: str, scope: str) -> dict[str, NDArray[np.bool_]]:
    """Flags of the ``floor(keep n)`` highest of every group, ties going to the lower index."""
    flags = {name: np.zeros(one.shape, np.bool_) for name, one in scores.items()}
    for names in groups(list(scores), scope):
        places = [
            (-value, at, name, index) for at, name in enumerate(names) for index, value in np.ndenumerate(scores[name])
        ]
        for _, _, name, index in sorted(places)[: int(Fraction(keep) * len(places))]:
            flags[name][index] = True
    return flags


def read_masks(path: Path) -> dict[str, NDArray[np.bool_]]:
    """Every mask of a file, spread over its weight."""
    with open_mask(path) as file:
        found = {}
        for name in file.names:
            shape = file.shape(name)
            assert shape is not None
            found[name] = np.broadcast_to(file.read(name, shape), shape)
        return found


def made(folder: Path, arrays: Arrays, **options: Any) -> dict[str, np.ndarray]:
    """The mask of a Fisher, spread over the weights."""
    fisher = write(folder / "fisher.safetensors", arrays)
    return read_masks(mask(fisher, folder / "mask.safetensors", MaskOptions(**options)).path)


def aggregated(arrays: Arrays, axis: int, combine: str = "sum") -> dict[str, np.ndarray]:
    return {
        n: getattr(a.astype(np.float64), combine)(axis=axis) if a.ndim > 1 else a.astype(np.float64)
        for n, a in arrays.items()
    }


def spread(flags: dict[str, np.ndarray], arrays: Arrays, axis: int) -> dict[str, np.ndarray]:
    return {
        n: np.broadcast_to(np.expand_dims(f, axis), arrays[n].shape) if arrays[n].ndim > 1 else f
        for n, f in flags.items()
    }


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, flags in wanted.items():
        assert (found[name] == flags).all(), name
