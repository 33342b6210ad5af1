"""File descriptors that several threads share."""

import os
import threading
from collections import defaultdict
from pathlib import Path

_READ_BYTES = 1 << 30  # the kernel moves at most 2 GiB per call
_WRITE_BYTES = 1 << 20  # a byte of an 8 MB call costs ext4 four times as much processor time
_MOST_THREADS = 4


def cores() -> int:
    """Return how many cores this process may use; 1 where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def file_threads() -> int:
    """Return how many threads should read or write large files at a time, beside others that compute."""
    return max(1, min(_MOST_THREADS, cores() // 4))


class OpenFiles:
    """Descriptors opened on first use and closed together; any thread reads and writes at any place."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self._writing: dict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._closed = False

    def descriptor(self, path: Path) -> int:
        """Return the descriptor of ``path``; raises ValueError once closed, OSError if the file cannot be opened."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{path}: already closed")
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, self._flags)
            return self._descriptors[path]

    def fill(self, path: Path, view: memoryview, offset: int) -> int:
        """Read into ``view`` from ``offset`` on; the number of bytes read, fewer only where the file ends early.

        Raises:
            OSError: the file cannot be opened or read.
        """
        descriptor, done = self.descriptor(path), 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + _READ_BYTES]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def write(self, path: Path, view: memoryview, offset: int) -> None:
        """Write all of ``view`` from ``offset`` on.

        The kernel lets one thread at a time write to a file, and has others wait in a busy loop; here they sleep.

        Raises:
            OSError: the file cannot be opened or written.
        """
        descriptor, done = self.descriptor(path), 0
        with self._lock:
            turn = self._writing[path]
        while done < len(view):
            with turn:
                done += os.pwrite(descriptor, view[done : done + _WRITE_BYTES], offset + done)

    @property
    def closed(self) -> bool:
        """True once close was called."""
        return self._closed

    def close(self) -> None:
        """Close all; a second call does nothing. No other thread may be reading or writing."""
        with self._lock:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
