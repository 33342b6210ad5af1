"""The command line in forked children: fast, killable at any change of the file system, limited in time and memory."""

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fork_server import Forked

WATCHED = Path(__file__).with_name("watched.py")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; negative for a signal.
        late: its time ran out, and it was killed.
        seconds: wall time.
        changes: (event, path) of every change of the file system, in order.
    """

    words: tuple[str, ...]
    code: int
    late: bool
    seconds: float
    stdout: str
    stderr: str
    changes: tuple[tuple[str, str], ...]


def run(
    words: Sequence[object],
    cwd: Path,
    *,
    timeout_seconds: float = 60.0,
    kill_after_seconds: float | None = None,
    **limits: int,
) -> Ended:
    """Run ``fisherkit WORDS`` in a folder.

    Args:
        words: the command line without the program's name.
        cwd: working folder of the child.
        timeout_seconds: the child is killed after that, and the end is ``late``.
        kill_after_seconds: the child is killed after that, which is no fault of its own.
        limits: ``kill_at`` (before the n-th change of the file system, from 1), ``memory_bytes``, ``file_bytes``.
    """
    arguments = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "changes")
        log.touch()
        request = json.dumps({"words": arguments, "log": str(log), **limits})
        with open(Path(folder, "out"), "w+b") as out, open(Path(folder, "err"), "w+b") as err, open(os.devnull) as none:
            began = time.monotonic()
            child = Forked([str(WATCHED), request], (none, out, err), cwd=cwd, env=_environment())
            late = _Killer(child.pid, timeout_seconds)
            asked = _Killer(child.pid, kill_after_seconds)
            code = child.wait()
            seconds = time.monotonic() - began
            asked.cancel()
            was_late = late.cancel()
            texts = [_text(Path(folder, name)) for name in ("out", "err")]
        changes = tuple((event, path) for event, _, path in (line.partition("\t") for line in _text(log).splitlines()))
    return Ended(tuple(arguments), code, was_late, seconds, *texts, changes)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _environment() -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **quiet, **single, "COLUMNS": "120"}


class _Killer:
    """Kills a process after some seconds, unless it is called off."""

    def __init__(self, pid: int, seconds: float | None) -> None:
        self._pid, self._fired = pid, False
        self._timer: Any = threading.Timer(seconds, self._kill) if seconds is not None else None
        if self._timer is not None:
            self._timer.start()

    def _kill(self) -> None:
        self._fired = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def cancel(self) -> bool:
        """Call it off; True if it was too late for that."""
        if self._timer is not None:
            self._timer.cancel()
        return self._fired
