"""The solved deltas as a PEFT adapter besides, in ``OUT/lora``: the best factors of a rank for each weight.

What is "best" is measured as the solve measures it, on new and old inputs; see kernels.regmean. Written tensor by
tensor, in float32; peft loads it onto BASE.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from fisherkit.checkpoint.atomic import disk_errors, write_text
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.floats import Floats
from fisherkit.kernels.moment import Doubles
from fisherkit.methods.merge.regmean import RegMean

FOLDER, WEIGHTS, CONFIG = "lora", "adapter_model.safetensors", "adapter_config.json"


class LoraOutput:
    """Adapter in the making; closed by ``finish``.

    Args:
        work: work folder of the run.
        shapes: [rows, columns] of every weight that gets factors, as stored.
        solver: gives the axis of their inputs.
        rank: of all factors.
        resume: an earlier process has written some of it.

    Raises:
        OutputError: no room on the disk.
        ResumeError: what the earlier process left is of another layout.
    """

    def __init__(
        self, work: Path, shapes: Mapping[str, tuple[int, ...]], solver: RegMean, rank: int, *, resume: bool
    ) -> None:
        self._work, self._rank = work / FOLDER, rank
        self._names = {name: solver.input_axis(name) for name in shapes}
        specs = [spec for name, axis in self._names.items() for spec in _specs(name, shapes[name], axis, rank)]
        target = self._work / WEIGHTS
        make = StreamedWriter.reopen if resume else StreamedWriter.create
        self._writer = make(target, specs, work=self._work)

    def add(self, name: str, b: Doubles, a: Doubles) -> None:
        """Write the factors of a weight's delta B A, B [O, K] and A [K, N] of a rank K that is not above the adapter's.

        Fewer are filled up with zeros.
        """
        for key, values, axis in zip(_keys(name), (a, b), (0, 1), strict=True):
            missing = self._rank - values.shape[axis]
            padding = [(0, missing if at == axis else 0) for at in (0, 1)]
            filled: Floats = np.ascontiguousarray(np.pad(values, padding), np.float32)
            self._writer.write_stored(key, filled.reshape(-1))
        self._writer.sync()

    def finish(self, folder: Path, done: Collection[str], base: str) -> None:
        """Put the adapter into the output's folder.

        Args:
            folder: where the output is made.
            done: weights whose factors are written, by this process or an earlier one.
            base: what BASE is called in public.

        Raises:
            OutputError: the disk is full.
        """
        self._writer.mark_written([key for name in self._names if name in done for key in _keys(name)])
        self._writer.seal()
        self._writer.close()
        target = folder / FOLDER
        with disk_errors(target):
            target.mkdir(exist_ok=True)
        write_text(target / CONFIG, json.dumps(self._config(base), indent=2) + "\n")
        with disk_errors(target):  # last: a run that is killed here finds it at one of the two places
            os.replace(self._work / WEIGHTS, target / WEIGHTS)

    def _config(self, base: str) -> dict[str, object]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self._rank,
            "lora_alpha": self._rank,  # a factor of 1
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(axis == 0 for axis in self._names.values()),
            "target_modules": sorted(name.removesuffix(".weight") for name in self._names),
            "inference_mode": True,
        }


def lora_files(folder: Path) -> list[str]:
    """Return the names of a finished adapter's files in an output's folder; none where there is no adapter."""
    names = [f"{FOLDER}/{name}" for name in (CONFIG, WEIGHTS)]
    return names if all((folder / name).is_file() for name in names) else []


def _keys(name: str) -> tuple[str, str]:
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _specs(name: str, shape: tuple[int, ...], input_axis: int, rank: int) -> tuple[TensorSpec, TensorSpec]:
    a, b = _keys(name)
    return TensorSpec(a, "F32", (rank, shape[input_axis])), TensorSpec(b, "F32", (shape[1 - input_axis], rank))
