"""The file of finished runs: a JSON line for each, and one for each session that made some; none is made twice."""

import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from benchmarks.forgetting.measures import Cell

Line = dict[str, Any]
Kind = Literal["one", "all"]
"""Whether a run learns one task or the sequence that begins with it."""


@dataclass(frozen=True)
class Run:
    """One run."""

    cell: Cell
    kind: Kind
    method: str
    setting: str

    @property
    def key(self) -> str:
        """Names its line."""
        return "/".join(map(str, (*self.cell, self.kind, self.method, self.setting)))

    @classmethod
    def of(cls, key: str) -> "Run":
        """Read a key."""
        base, seed, task, kind, method, setting = key.split("/")
        assert kind in ("one", "all")
        return cls(Cell(int(base), int(seed), task), kind, method, setting)


def read_lines(path: Path) -> list[Line]:
    """Return finished runs; a last line that was cut off by a kill is not one, and of a key the first counts."""
    found: dict[str, Line] = {}
    for line in _parsed(path):
        if "key" in line:
            found.setdefault(line["key"], line)
    return list(found.values())


def read_sessions(path: Path) -> list[Line]:
    """Return machine and versions of every session, each once."""
    found = [line["made"] for line in _parsed(path) if "made" in line]
    return [made for at, made in enumerate(found) if made not in found[:at]]


def _parsed(path: Path) -> list[Line]:
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def begin_session(path: Path, device: str, threads: int) -> None:
    """Say what makes the lines that follow; a line that was cut off must not swallow it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    add_line(path, {"made": _machine(device, threads)})


def add_line(path: Path, line: Line) -> None:
    """Append a line and see it to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _machine(device: str, threads: int) -> dict[str, str]:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    return {
        "commit": described.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "CPU": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "on": torch.cuda.get_device_name() if device.startswith("cuda") else f"{threads} thread(s) a run",
    }
