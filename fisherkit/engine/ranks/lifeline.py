"""Connections between the first process and every other, by which each knows at once that one has failed or is gone.

Collectives do not tell: a process that waits in one for a peer that never comes waits forever, or learns only that
something broke. A failure is told over these connections with its reason; a process that ends without a word (killed)
is seen by its connection's end.
"""

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

GRACE = 10.0
"""Seconds that a process may take to leave by itself, once another has failed; it is ended then."""
_POLL, _CONNECT = 0.2, 60.0
_GONE = "ended without a word; killed, or out of memory"


@dataclass(frozen=True)
class Failure:
    """Which process failed, where, and why."""

    rank: int
    host: str
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.reason}"


class Lifeline:
    """Watches the connections in a thread of its own.

    Args:
        rank: of this process.
        wires: connections by the rank at the other end: all the others' in the first process, its own in all others.
        hosts: of all processes.

    Attributes:
        failure: the first one that is known.
    """

    def __init__(self, rank: int, wires: Mapping[int, socket.socket], hosts: Sequence[str]) -> None:
        self._rank, self._wires, self._hosts = rank, dict(wires), hosts
        self._rest: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._hung_up = threading.Event()
        self.failure: Failure | None = None
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def report(self, reason: str) -> None:
        """Tell all other processes that this one fails."""
        self._spread(Failure(self._rank, self._hosts[self._rank], reason))

    def wait_for_failure(self, seconds: float) -> Failure | None:
        """Return the failure that is known, or becomes known in this time."""
        until = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < until:
            time.sleep(0.02)
        return self.failure

    def wait_for_first(self) -> bool:
        """Wait until the first process has left, which has then said what went wrong; False where it does not."""
        return self._hung_up.wait(GRACE + 2)

    def close(self, *, well: bool) -> None:
        """Hang up; ``well`` says that nothing went wrong here."""
        self._closed.set()
        self._thread.join()
        for wire in self._wires.values():
            if well:
                _send(wire, {"bye": True})
            wire.close()

    def _watch(self) -> None:
        ends = None
        while not self._closed.is_set():
            ready, _, _ = select.select(list(self._wires.values()), [], [], _POLL) if self._wires else ([], [], [])
            for rank, wire in [(rank, wire) for rank, wire in self._wires.items() if wire in ready]:
                self._hear(rank, wire)
            if not self._wires:
                self._closed.wait(_POLL)
            if self.failure is not None and self.failure.rank != self._rank:
                ends = ends or time.monotonic() + GRACE
                if time.monotonic() > ends:
                    self._end()

    def _hear(self, rank: int, wire: socket.socket) -> None:
        try:
            heard = wire.recv(1 << 16)
        except OSError:
            heard = b""
        if not heard:
            self._drop(rank)
            self._spread(Failure(rank, self._hosts[rank], _GONE))
            return
        *lines, self._rest[rank] = (self._rest.get(rank, b"") + heard).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "bye" in message:
                self._drop(rank)
            else:
                self._spread(Failure(**message))

    def _drop(self, rank: int) -> None:
        self._wires.pop(rank).close()
        self._hung_up.set()

    def _spread(self, failure: Failure) -> None:
        """Keep the first failure, and pass it on."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
            for rank, wire in list(self._wires.items()):
                if rank != failure.rank:
                    _send(wire, asdict(failure))

    def _end(self) -> None:
        """End a process that does not come back from a collective or a device; its files survive any death."""
        if self._rank == 0:
            os.write(2, f"Error: {self.failure}\n".encode())
        os._exit(1)


def _send(wire: socket.socket, message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):
        wire.sendall(json.dumps(message).encode() + b"\n")


def listen(address: str) -> socket.socket:
    """Return a socket that the other processes call, on a free port of an address of this machine."""
    return socket.create_server((address, 0), backlog=1024)


def answer(listening: socket.socket, size: int, token: str) -> dict[int, socket.socket]:
    """Wait for the calls of all other processes; return their connections by rank.

    Args:
        listening: from ``listen``; closed afterwards.
        size: number of processes.
        token: that a caller must know.

    Raises:
        TimeoutError: not all called in a minute.
    """
    wires: dict[int, socket.socket] = {}
    with listening:
        listening.settimeout(_CONNECT)
        while len(wires) < size - 1:
            wire, _ = listening.accept()
            wire.settimeout(_CONNECT)
            name, _, rank = _first_line(wire).partition(" ")
            if name == token and rank.isdecimal():
                wires[int(rank)] = wire
            else:
                wire.close()
    return wires


def call(address: str, port: int, rank: int, token: str) -> socket.socket:
    """Call the first process."""
    wire = socket.create_connection((address, port), timeout=_CONNECT)
    wire.sendall(f"{token} {rank}\n".encode())
    return wire


def _first_line(wire: socket.socket) -> str:
    text = b""
    with contextlib.suppress(OSError):
        while not text.endswith(b"\n") and len(text) < 200 and (byte := wire.recv(1)):
            text += byte
    return text.decode("utf-8", "replace").strip()
