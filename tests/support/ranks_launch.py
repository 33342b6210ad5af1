"""Commands run as the ranks of one run, each in a process of its own, as torchrun would start them."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fork_server import Done, Forked

_MAIN = "{}; from fisherkit.cli import progress; progress.PAUSE = 0; from fisherkit.__main__ import main; main()"


@dataclass
class Rank:
    """One of the processes, and the files that it prints into."""

    program: Forked
    out: Path
    err: Path


class Launch:
    """The ranks of one run, started.

    Args:
        size: number of ranks.
        words: of the command, without ``fisherkit``.
        first: lines that run before the command, by rank.
        cwd: their folder.
    """

    def __init__(self, size: int, *words: object, first: Mapping[int, str] | None = None, cwd: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks: list[Rank] = []
        self._folder = tempfile.TemporaryDirectory()
        for number in range(size):
            place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
            env = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            out, err = (Path(self._folder.name) / f"{number}.{name}" for name in ("out", "err"))
            code = _MAIN.format((first or {}).get(number, "pass"))
            with open(os.devnull) as nothing, out.open("w") as to_out, err.open("w") as to_err:
                program = Forked(["-c", code, *map(str, words)], (nothing, to_out, to_err), cwd=cwd, env=env)
            self.ranks.append(Rank(program, out, err))

    def kill(self, number: int, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank."""
        self.ranks[number].program.send_signal(signal_number)

    def said(self, number: int) -> str:
        """Return what a rank has printed on stderr so far."""
        return self.ranks[number].err.read_text()

    def wait_until_said(self, number: int, text: str, timeout: float = 60) -> None:
        """Return when a rank has printed a text on stderr."""
        until = time.monotonic() + timeout
        while text not in self.said(number):
            assert time.monotonic() < until, self.said(number)
            time.sleep(0.01)

    def wait(self, timeout: float = 60) -> list[Done]:
        """Wait for all ranks to end, and return how they did."""
        with self._folder:
            codes = [rank.program.wait(timeout) for rank in self.ranks]
            return [
                Done([], code, rank.out.read_text(), rank.err.read_text())
                for code, rank in zip(codes, self.ranks, strict=True)
            ]
